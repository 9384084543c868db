"""Dashboards as code: the panels, defined once, as Grafana JSON, as a Prometheus console page, and as a snapshot.

In Prometheus each number of the rows of rank 0 is a gauge `train_<series>` with the label `run`.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

import matplotlib.pyplot as plt
import pandas as pd
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.builders.common import GraphThresholdsStyleConfig
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode

from stackpkg import plots
from stackpkg.runs import write_json, write_text
from stackpkg.telemetry.exporter import LISTS
from stackpkg.telemetry.kpis import KPI

KPIS = "Key performance indicators"
PANELS: dict[str, dict[str, tuple[str, str]]] = {  # group -> title -> unit, in Grafana's words, and names of series
    "Optimisation": {
        "Loss, total and held-out": ("none", "loss validation_loss"),
        "Objectives, as weighted": ("none", "weighted_*"),
        "Gradient norm": ("none", "grad_norm"),
        "Gradient norm by objective": ("none", "gradient_*"),
        "Learning rate": ("none", "learning_rate"),
        "Effective betas": ("none", "beta1_effective beta2_effective"),
        "Update over weights": ("none", "update_ratio"),
    },
    "Attention": {
        "Attention entropy": ("percentunit", "attention_entropy_m*"),
        "Masked edges that received attention": ("percentunit", "masked_edge_share"),
    },
    "Routing": {
        "Router entropy": ("percentunit", "router_entropy router_entropy_min"),
        "Expert usage, extremes": ("percentunit", "router_usage_max router_usage_min"),
        "Router regret": ("none", "router_regret router_regret_max"),
    },
    "Retrieval": {
        "Precision": ("percentunit", "precision_at_k batch_precision_at_1"),
        "Similarity of pairs": ("none", "similarity_positive similarity_negative"),
        "Rejections by filter": ("none", "rejected_*"),
    },
    "Safety": {"Conformance": ("percentunit", "violations forbidden_attention")},
    "Memory": {
        "KV compression": ("percentunit", "kv_ratio kv_hit_rate"),
        "KV error": ("none", "kv_error kv_distortion"),
        "KV evictions": ("none", "kv_evictions"),
    },
    "Stability": {
        "NaN, overflow, skipped updates": ("none", "nonfinite nan_count overflow_count update_skipped recovery_rung"),
        "Activation outliers": ("percentunit", "activation_outlier_rate"),
    },
    "Throughput": {
        "Tokens per second": ("none", "tokens_per_second"),
        "FLOPs utilisation": ("percentunit", "flops_utilisation"),
        "Time of a step": ("s", "step_seconds step_seconds_max data_wait_seconds data_wait_seconds_max"),
        "Memory": ("decmbytes", "memory_mb memory_mb_max device_memory_mb device_memory_mb_max"),
        "Cost of telemetry": ("percentunit", "probe_share"),
    },
}


DRILL_DOWN = {  # title -> unit, and a series of values of each layer: a line per entry, for the layers that one chooses
    "Usage of each expert": ("percentunit", "router_usage"),
    "Router entropy of each layer": ("percentunit", "router_entropy_layers"),
    "Router regret of each layer": ("none", "router_regret_layers"),
    "Attention entropy of each head": ("percentunit", "attention_entropy_heads"),
}


class Panel(NamedTuple):
    """One picture: its series, and for an indicator the definition that its target comes from."""

    group: str
    title: str
    unit: str
    series: tuple[str, ...]  # columns of the rows, or one ratio of two
    kpi: KPI | None = None
    by: tuple[str, ...] = ()  # labels that tell the lines of one series apart

    @property
    def slug(self) -> str:
        return re.sub(r"\W+", "-", f"{'kpi ' if self.kpi else ''}{self.title}".lower()).strip("-")

    @property
    def expression(self) -> str:
        """PromQL; `$run` is Grafana's variable."""
        if len(self.series) > 1:
            return f'{{__name__=~"{"|".join(f"train_{name}" for name in self.series)}",run=~"$run"}}'
        return " / ".join(f'train_{name}{{run=~"$run"}}' for name in self.series[0].split(" / "))

    @property
    def target(self) -> float | None:
        """Where the line of the target lies; a fall is judged against its own beginning."""
        return None if not self.kpi or self.kpi.statistic == "fall" else float(self.kpi.target)

    @property
    def description(self) -> str:
        if not (kpi := self.kpi):
            return ", ".join(self.series)
        page = f" Runbook: runbooks/{kpi.runbook}.html" if kpi.runbook else ""
        return (
            f"{kpi.formula}: {kpi.comparison} {kpi.target:g}. {kpi.owner.capitalize()}, if missed: {kpi.missed}.{page}"
        )

    def data(self, history: pd.DataFrame) -> pd.DataFrame:
        """A column per series, a row per step that measured one."""
        columns = {}
        for name in self.series:
            above, *below = (history[part].astype(float) for part in name.split(" / "))
            columns[name] = above / below[0] if below else above
        return pd.DataFrame(columns).dropna(how="all")


def panels(history: pd.DataFrame, kpis: Iterable[KPI]) -> list[Panel]:
    """Those that the rows of one rank have data for, the indicators first."""
    there = {name for name in history.columns if history[name].dtype.kind in "iufb" and history[name].notna().any()}
    found = [Panel(KPIS, kpi.name, "none", (kpi.series,), kpi) for kpi in kpis if {*kpi.series.split(" / ")} <= there]
    for group, titles in PANELS.items():
        for title, (unit, patterns) in titles.items():
            series = [name for pattern in patterns.split() for name in sorted(there) if fnmatchcase(name, pattern)]
            found += [Panel(group, title, unit, tuple(dict.fromkeys(series)))] * bool(series)
    return found


def drill_down(history: pd.DataFrame) -> list[Panel]:
    """Those of `DRILL_DOWN` that the rows of one rank have, for Grafana: a large model has thousands of lines."""
    there = {title: told for title, told in DRILL_DOWN.items() if told[1] in history and history[told[1]].notna().any()}
    return [Panel("Drill-down", title, unit, (name,), by=LISTS[name]) for title, (unit, name) in there.items()]


# --- live: Grafana and the console of Prometheus


def _chart(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().title(panel.title).description(panel.description).unit(panel.unit).span(8).height(7)
    names = " ".join(f"{label} {{{{{label}}}}}" for label in panel.by) or "{{__name__}}"
    asked = panel.expression
    if panel.by:
        asked = asked.replace('run=~"$run"', 'run=~"$run",layer=~"$layer"')
    query = prometheus.Dataquery().expr(asked).legend_format(f"{{{{run}}}} {names}")
    made.datasource(DataSourceRef(type_val="prometheus", uid="${source}")).with_target(query)
    if panel.kpi and panel.target is not None:
        below, above = ("red", "green") if panel.kpi.comparison == ">=" else ("green", "red")
        steps = [Threshold(None, below), Threshold(panel.target, above)]
        made.thresholds(build.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        made.thresholds_style(GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.LINE))
    return made


def grafana(shown: Iterable[Panel]) -> str:
    """Dashboard JSON (Grafana 11.6) to import; data source, runs and layers are chosen in it."""
    source = build.DatasourceVariable("source").type("prometheus")
    run = build.QueryVariable("run").datasource(DataSourceRef(type_val="prometheus", uid="${source}"))
    run = run.query("label_values(train_loss, run)").multi(True).include_all(True)
    layer = build.QueryVariable("layer").datasource(DataSourceRef(type_val="prometheus", uid="${source}"))
    layer = layer.query('label_values({run=~"$run",layer!=""}, layer)').multi(True).include_all(True)
    made = build.Dashboard("Training").uid("stackpkg-training").tags(["stackpkg", "generated"]).refresh("10s")
    made = made.time("now-1h", "now").with_variable(source).with_variable(run).with_variable(layer)
    group = ""
    for panel in shown:
        if panel.group != group:
            made, group = made.with_row(build.Row(panel.group)), panel.group
        made = made.with_panel(_chart(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:75rem;padding:0 1rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #8886}
.yes{color:light-dark(#1a6b3c,#7fd09d)}.no{color:light-dark(#a61b1b,#ff9c9c)}figure{margin:1rem 0}figcaption{opacity:.8}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(21rem,1fr));gap:1rem}svg{width:100%;height:9rem}
img{width:100%;background:#fff;border-radius:6px}polyline{fill:none;stroke-width:1.5}small{opacity:.8}
"""
SCRIPT = """const shades=["#0b6e99","#d9730d","#448361","#9065b0","#c14c8a","#787774"],end=Date.now()/1e3,span=3600,drawn=[];
for(const f of document.querySelectorAll("figure"))drawn.push(fetch("/api/v1/query_range?"+new URLSearchParams({
 query:f.dataset.query.replaceAll("$run",run),start:end-span,end,step:15})).then(r=>r.json()).then(({data})=>{
 const goal=f.dataset.target===""?[]:[+f.dataset.target],lines=data.result.map(m=>m.values.map(([t,y])=>[+t,+y]).filter(p=>isFinite(p[1])));
 const all=lines.flat(),seen=all.map(p=>p[1]),ys=seen.concat(goal),low=Math.min(...ys),high=Math.max(...ys);
 const first=Math.min(...all.map(p=>p[0])),wide=Math.max(1,end-first),tall=high-low||1,place=y=>95-90*(y-low)/tall;
 const svg=f.querySelector("svg"),draw=(points,colour,dash)=>{const line=document.createElementNS("http://www.w3.org/2000/svg","polyline");
  line.setAttribute("points",points);line.setAttribute("stroke",colour);line.setAttribute("vector-effect","non-scaling-stroke");
  if(dash)line.setAttribute("stroke-dasharray","4");svg.append(line)};
 lines.forEach((line,i)=>draw(line.map(([t,y])=>`${300*(t-first)/wide},${place(y)}`).join(" "),shades[i%shades.length]));
 goal.forEach(y=>draw(`0,${place(y)} 300,${place(y)}`,"crimson",true));
 const names=data.result.map(m=>(m.metric.__name__||"").replace("train_",""));
 f.querySelector("small").textContent=all.length?`${Math.min(...seen).toPrecision(3)} to ${Math.max(...seen).toPrecision(3)}; ${names.filter(n=>n).join(", ")}`:"no data in the last hour";
}));
Promise.all(drawn).then(()=>{document.body.dataset.drawn=drawn.length;setTimeout(()=>location.reload(),15000)});
"""


def _verdict(kpi: KPI, series: str) -> str:
    """Cells of the console's table, which Prometheus fills in (Go templates): the value of a run, and whether it is met."""
    window = {"median": "quantile_over_time(0.5, (%s)[1d:])", "maximum": "max_over_time(%s[1d])"}
    query = window.get(kpi.statistic, "%s").replace("%s", series.replace("$run", "%s")).replace('"%s"', "%q")
    runs = " $run" * query.count("%q")
    ask = f"{{{{ range query (printf `{query}`{runs}) }}}}"
    test = {"<": "lt", "<=": "le", ">=": "ge"}[kpi.comparison]
    said = f'{{{{ if {test} .Value {float(kpi.target)!r} }}}}<b class="yes">met</b>{{{{ else }}}}<b class="no">missed</b>{{{{ end }}}}'
    return (
        f"<td>{ask}{{{{ .Value | humanize }}}}</td><td>{'at the end' if kpi.statistic == 'fall' else said}{{{{ end }}}}"
    )


def console(shown: Iterable[Panel]) -> str:
    """A page for the folder `--web.console.templates` of Prometheus; needs nothing else, and loads nothing from elsewhere."""
    shown = list(shown)
    run = '{{ $run := .Params.run }}{{ if not $run }}{{ range query "group by (run) (train_loss)" }}{{ $run = .Labels.run }}{{ end }}{{ end }}'
    others = '{{ range query "group by (run) (train_loss)" }} <a href="?run={{ .Labels.run }}">{{ .Labels.run }}</a>{{ end }}'
    rows = [
        f"<tr><td>{html.escape(p.title)}{_verdict(p.kpi, p.expression)}<td>{html.escape(f'{p.kpi.comparison} {p.kpi.target:g}')}"
        f"<td>{p.kpi.owner}<td>{html.escape(p.kpi.missed)}</tr>"
        for p in shown
        if p.kpi
    ]
    figures = [
        f'<figure data-query="{html.escape(p.expression)}" data-target="{"" if p.target is None else p.target}">'
        f"<figcaption><b>{html.escape(p.title)}</b></figcaption>"
        f'<svg viewBox="0 0 300 100" preserveAspectRatio="none" role="img" aria-label="{html.escape(p.title)}"></svg>'
        "<small></small></figure>"
        for p in shown
    ]
    firing = '{{ range query (printf `ALERTS{alertstate="firing",run=%q}` $run) }} <b class="no">{{ .Labels.alertname }}</b>{{ else }} none{{ end }}'
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Training</title>\n<style>{STYLE}</style>\n{run}\n'
        f"<h1>{{{{ $run }}}}</h1><p>Runs:{others}. Alerts that fire:{firing}</p>\n"
        "<table><tr><th>indicator<th>now<th>target met<th>target<th>owner<th>if missed</tr>\n"
        + "\n".join(rows)
        + "</table>\n"
        '<div class="grid">\n'
        + "\n".join(figures)
        + f"\n</div>\n<script>const run={{{{ $run }}}};\n{SCRIPT}</script>\n</html>\n"
    )


def silent(shown: Iterable[Panel], prometheus_url: str, run: str) -> list[str]:
    """Titles of the panels whose expression gives no number for `run` on a Prometheus that is asked now."""
    missing = []
    for panel in shown:
        asked = urlencode({"query": panel.expression.replace("$run", re.escape(run).replace("\\", 2 * "\\"))})
        with urlopen(f"{prometheus_url}/api/v1/query?{asked}", timeout=30) as answer:  # noqa: S310  http on loopback
            result = json.load(answer)["data"]["result"]
        missing += [panel.title] * (not result)
    return missing


# --- the snapshot for the archive


def alt(panel: Panel, data: pd.DataFrame) -> str:
    """What the picture shows, in words, for who can't see it."""
    told = []
    for name in list(data)[:4]:
        values = data[name].dropna()
        told.append(
            f"{name} from {values.iloc[0]:.3g} to {values.iloc[-1]:.3g}, lowest {values.min():.3g}, highest {values.max():.3g}"
        )
    more = f"; and {data.shape[1] - 4} more" if data.shape[1] > 4 else ""
    target = "" if panel.target is None or not panel.kpi else f"; target {panel.kpi.comparison} {panel.target:g}"
    return f"{panel.title}, steps {data.index[0]} to {data.index[-1]}: {'; '.join(told)}{more}{target}"


def snapshot(shown: Iterable[Panel], history: pd.DataFrame, verdicts: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write each panel's picture (SVG) with its data (CSV) beside it, `panels.json` that lists them, and `snapshot.html`
    that holds all. Returns the list: title, picture, data, alternative text."""
    listed, figures = [], []
    for panel in shown:
        data, names = panel.data(history), (f"{panel.slug}.svg", f"{panel.slug}.csv")
        said = alt(panel, data)
        figure = plots.lines(data, panel.title, panel.target)
        picture = plots.svg(figure)
        plt.close(figure)
        write_text(folder / names[0], picture)
        write_text(folder / names[1], data.to_csv())
        listed.append({"group": panel.group, "title": panel.title, "picture": names[0], "data": names[1], "alt": said,
                       "expression": panel.expression, "target": panel.target})  # fmt: skip
        coded = base64.b64encode(picture.encode()).decode()
        figures.append(f'<figure><img alt="{html.escape(said)}" src="data:image/svg+xml;base64,{coded}">'
                       f"<figcaption>{html.escape(panel.description)}</figcaption></figure>")  # fmt: skip
    write_json(folder / "panels.json", listed)
    table = verdicts.to_html(index=False, border=0, justify="left")
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Snapshot</title><style>{STYLE}</style>'
    write_text(folder / "snapshot.html", f'{page}{table}<div class="grid">{"".join(figures)}</div></html>\n')
    return pd.DataFrame(listed)[["title", "picture", "data", "alt"]]
