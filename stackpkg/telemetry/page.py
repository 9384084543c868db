"""A live page of one job, on loopback: the panels of the dashboards over the rows as they come. It needs no account and
no other server, and loads nothing from elsewhere."""

from __future__ import annotations

import html
import ipaddress
import json
import math
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stackpkg.params import Params, validate
from stackpkg.runs import read_json, strict
from stackpkg.telemetry import dashboards, exporter, kpis, store

MOST = 200  # buckets of a line, of each of which both extremes are drawn
TOLD = 8  # events of the job that the page shows, the newest first
SCRIPT = """const shades=["#0b6e99","#d9730d","#448361","#9065b0","#c14c8a","#787774"],
 grid=document.querySelector(".grid"),
 make=(name,text)=>{const e=document.createElement(name);e.textContent=text??"";return e},
 vector=(name,set)=>{const e=document.createElementNS("http://www.w3.org/2000/svg",name);
  for(const k in set)e.setAttribute(k,set[k]);return e};
function draw(panel){const lines=Object.entries(panel.lines),goal=panel.target===null?[]:[panel.target],
 all=lines.flatMap(([,l])=>l),seen=all.map(p=>p[1]),ys=seen.concat(goal),xs=all.map(p=>p[0]).concat(panel.broken),
 low=Math.min(...ys),tall=Math.max(...ys)-low||1,first=Math.min(...xs),wide=Math.max(...xs)-first||1,
 x=v=>300*(v-first)/wide,y=v=>95-90*(v-low)/tall,f=make("figure"),c=make("figcaption"),
 svg=vector("svg",{viewBox:"0 0 300 100",preserveAspectRatio:"none",role:"img","aria-label":panel.title}),
 line=(points,colour,dash)=>svg.append(vector("polyline",{points,stroke:colour,"vector-effect":"non-scaling-stroke",
  "stroke-dasharray":dash||"none"}));
 lines.forEach(([,l],i)=>line(l.map(([a,b])=>x(a)+","+y(b)).join(" "),shades[i%shades.length]));
 goal.forEach(v=>line("0,"+y(v)+" 300,"+y(v),"crimson","4"));
 panel.broken.forEach(v=>line(x(v)+",0 "+x(v)+",100","crimson","1"));
 c.append(make("b",panel.title));f.append(c,svg,make("small",
  (seen.length?Math.min(...seen).toPrecision(3)+" to "+Math.max(...seen).toPrecision(3)+"; ":"")+
  lines.map(([n])=>n).join(", ")+
  (panel.broken.length?"; not finite in step "+panel.broken.join(", "):"")));return f}
async function look(){try{const told=await(await fetch("data")).json();
 document.querySelector("#state").textContent=told.state;
 document.querySelector("#events").replaceChildren(...told.events.map(e=>make("li",e)));
 grid.replaceChildren(...told.panels.map(draw));document.body.dataset.step=told.step}
 catch{document.querySelector("#state").textContent="the page's server has ended"}setTimeout(look,2000)}look()"""


def _page(title: str, nonce: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<style nonce="{nonce}">{dashboards.STYLE}</style><h1>{title}</h1><p id="state" role="status">no rows yet</p>'
        f'<ul id="events"></ul><div class="grid"></div><script nonce="{nonce}">{SCRIPT}</script></html>'
    )


class Followed:
    """What the files of a job say now; each call of `told` reads what was added since."""

    def __init__(self, run: Path, job: str) -> None:
        self.run, self.job, self.file = run, job, run / "checkpoints" / job / "job.json"
        self._lock, self._began = threading.Lock(), -1
        self.history: dict[int, dict[str, Any]] = {}

    def read(self) -> None:
        """Rows of rank 0 that count, as `rows.EFFECTIVE` has them: of a step that of the latest attempt, the later of
        two. All are read anew when the job was launched again."""
        began = self.file.stat().st_mtime_ns if self.file.exists() else 0
        if began != self._began:
            self._rows, self._began, self.history = exporter.Rows(self.run / "telemetry" / self.job, None), began, {}
        for row in self._rows.added():
            before = self.history.get(row["step"])
            if row["rank"] == 0 and (not before or row["attempt"] >= before["attempt"]):
                self.history[row["step"]] = row

    def told(self) -> dict[str, Any]:
        """state, step, events, and of each panel its lines (points of step and value), target and steps not finite."""
        with self._lock:
            self.read()
            history = pd.DataFrame(list(self.history.values()))
        events = [f"step {each['step']}: {each['kind']} {each['said']}" for each in store.events(self.run, self.job)]
        found: dict[str, Any] = {"state": "no rows yet", "step": 0, "panels": [], "events": events[::-1][:TOLD]}
        if history.empty:
            return found
        history = history.set_index("step").sort_index()
        p = validate(read_json(self.file)["params"]) if self._began and "params" in read_json(self.file) else Params()
        last = history.iloc[-1]
        ended = "done" if self.file.with_name("done.json").exists() else f"{time.time() - last['time']:.0f} s ago"
        state = f"step {history.index[-1]}, attempt {last['attempt']}, last row {ended}"
        panels = [self._panel(panel, history) for panel in dashboards.panels(history, kpis.load(p))]
        return found | {"state": state, "step": int(history.index[-1]), "panels": panels}

    def _panel(self, panel: dashboards.Panel, history: pd.DataFrame) -> dict[str, Any]:
        data, told = panel.data(history), self.history.items()
        broken = [step for step, row in told for name in panel.series if not math.isfinite(_number(row.get(name)))]
        lines = {name: thin(data[name]) for name in data}
        return {"title": panel.title, "group": panel.group, "target": panel.target, "lines": lines,
                "broken": sorted({*broken})[-MOST:]}  # fmt: skip


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def thin(values: pd.Series) -> list[list[float]]:
    """Points (step, value) that are finite; of a long series both extremes of `MOST` buckets: no spike is lost."""
    values = values[np.isfinite(values)]
    places = np.arange(len(values))
    if len(values) > 2 * MOST:
        told, parts = values.to_numpy(), np.array_split(places, MOST)
        places = np.unique([part[pick(told[part])] for part in parts for pick in (np.argmin, np.argmax)])
    return [[int(values.index[k]), float(values.iloc[k])] for k in places]


def serve(run: Path, job: str, address: str) -> ThreadingHTTPServer:
    """A server, not running yet, for the page of a job of the run in the folder `run`. Raises `ValueError` for an
    address that another machine could reach."""
    host, _, port = address.rpartition(":")
    try:
        inside = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside or not port.isdigit():
        raise ValueError(f"{address!r} is no address of this machine alone; give 127.0.0.1:PORT. From elsewhere: "
                         "ssh -L 8000:127.0.0.1:PORT this-machine, and open http://127.0.0.1:8000")  # fmt: skip
    followed, title = Followed(run, job), html.escape(f"{run.name}: {job}")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            named = self.headers.get("Host", "").rpartition(":")[0]
            if named not in (host, "localhost", "127.0.0.1"):  # a name of elsewhere that was made to lead here
                self._answer(403, "text/plain", "ask for this page as 127.0.0.1")
            elif self.path == "/":
                self._answer(200, "text/html", _page(title, nonce := secrets.token_urlsafe(16)), nonce)
            elif self.path == "/data":
                self._answer(200, "application/json", json.dumps(strict(followed.told()), allow_nan=False))
            else:
                self._answer(404, "text/plain", "there is / and /data")

        def _answer(self, status: int, kind: str, text: str, nonce: str = "") -> None:
            body = text.encode()
            policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'"
            self.send_response(status)
            for name, value in {
                "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": "no-store",
                "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
            }.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return ThreadingHTTPServer((host, int(port)), Handler)
