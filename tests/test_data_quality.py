"""What the audit, the proposals, the metrics, the flow and the report say of parts whose every number is known."""

import hashlib

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackpkg import plots
from stackpkg.data import filters, quality, records
from stackpkg.evaluation import curation
from stackpkg.params import Data

EVIL = "<script>alert('x')</script>"
DATA = Data(filters={"*": ["fineweb"]}, min_words=3, min_alphabetic=0.0)


def words(k):
    return " ".join(f"word{chr(97 + j % 26)}{chr(97 + j // 26)}" for j in range(k)) + "."


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Domain web: texts of 1 to 20 words; domain `EVIL`: five texts, two of them equal."""
    rows = [{"record_id": f"w{k:02}", "source": f"t/{k}", "domain": "web", "text": words(k)} for k in range(1, 21)]
    rows += [
        {"record_id": f"e{k}", "source": EVIL, "domain": EVIL, "text": words((8, 9, 10, 10, 1)[k])} for k in range(5)
    ]
    for row in rows:
        row["content_hash"] = hashlib.sha256(row["text"].encode()).hexdigest()
    folder = tmp_path_factory.mktemp("parts")
    made = records.table(rows).append_column("language", pa.array(["en"] * 19 + ["de"] + ["en"] * 5))
    out = []
    for k, some in enumerate((made.slice(0, 11), made.slice(11))):
        pq.write_table(some, folder / f"before{k}.parquet")
        pq.write_table(filters.apply(some, DATA, None), folder / f"after{k}.parquet")
    for name in ("before", "after"):
        out.append(sorted(folder.glob(f"{name}*.parquet")))
    return out


def test_borderline_samples_are_the_nearest_on_both_sides(parts):
    found = quality.borderline(parts[1], "min_words", 2)
    assert found["value"].tolist() == [1, 2, 3, 4] and found["decision"].tolist() == ["drop"] * 2 + ["keep"] * 2
    assert found["record_id"].tolist()[1:] == ["w02", "w03", "w04"] and found["excerpt"][3] == words(4)
    assert EVIL not in found.to_html()
    with pytest.raises(ValueError, match="'min_word'"):
        quality.borderline(parts[1], "min_word", 2)


def test_proposals_drop_what_they_say(parts):
    table = quality.propose(parts[1], [0.1, 0.5]).set_index(["filter", "domain", "share"])
    row = table.loc["min_words", "web", 0.1]
    assert row["documents"] == 20 and row["threshold"] == 3 and row["drops"] == pytest.approx(2 / 20)
    assert row["proposed"] == pytest.approx(2.9) and row["would_drop"] == pytest.approx(2 / 20)
    half = table.loc["max_document_kb", "web", 0.5]
    assert half["drops"] == 0 and half["would_drop"] == pytest.approx(0.5)
    for (name, domain, _), item in table.iterrows():  # the proposal, taken as the threshold, drops just that share
        values = [
            row["value"]
            for path in parts[1]
            for record in pq.read_table(path).to_pylist()
            for row in record["decisions"]
            if row["filter"] == name and record["domain"] == domain
        ]
        keeps = filters.SIGNS[filters.sign_of(name)]
        assert item["would_drop"] == pytest.approx(sum(not keeps(v, item["proposed"]) for v in values) / len(values))


def test_metrics_are_those_of_the_rows_that_are_left(parts):
    before, after = (quality.metrics(some) for some in parts)
    assert before.index.tolist() == [EVIL, "web"]
    web = before.loc["web"]
    assert (web["documents"], web["words"], web["median_words"]) == (20, 210, 10.5)
    assert web["mb"] == pytest.approx(sum(len(words(k)) for k in range(1, 21)) / 1e6)
    assert web["unique_words"] == 1 and (web["language"], web["language_share"]) == ("en", 0.95)
    assert web["alphabetic"] == pytest.approx(sum(6 * k / (6 * k + 1) for k in range(1, 21)) / 20)
    assert before.loc[EVIL, "duplicates"] == pytest.approx(1 / 5) and pd.isna(web["perplexity"])
    kept = {k for k in range(1, 21) if k >= 3 and len(words(k)) >= 30}
    assert after.loc["web", "documents"] == len(kept) and after.loc["web", "words"] == sum(kept)


def test_losses_add_up_and_the_flow_draws_them(parts):
    lost = quality.losses(parts[1], "filters")
    assert lost.groupby("domain")["documents"].sum().to_dict() == {"web": 20, EVIL: 5}
    by = lost.set_index(["domain", "reason"])["documents"]
    assert by["web", "min_words"] == 2 and by["web", "fineweb_short_line"] == 2 and by["web", ""] == 16
    later = pd.DataFrame([("web", "duplicates", "near", 6), ("web", "duplicates", "", 10), (EVIL, "duplicates", "", 4)])
    links = quality.flow(pd.concat([lost, later.set_axis(lost.columns, axis=1)]))
    assert links["web", "kept"] == 10 and links["web", "lost: filters"] == 4
    assert links["lost: filters", "min_words"] == 3 and links["lost: duplicates", "near"] == 6
    names = {name for pair in links for name in pair}
    for name in (n for n in names if n.startswith("lost")):  # what flows in flows out
        assert sum(n for (_, b), n in links.items() if b == name) == sum(n for (a, _), n in links.items() if a == name)
    figure = plots.flow(links)
    (axes,) = figure.axes
    assert {text.get_text().rpartition("  ")[0] for text in axes.texts} == names
    assert len(axes.collections) == len(links) and "kept  14" in {text.get_text() for text in axes.texts}
    assert quality.flow(lost.iloc[:0]) == {} and not plots.flow({}).axes[0].texts


def test_the_report_is_one_page_with_both_sides_of_each_stage_and_nothing_live_in_it(parts, tmp_path):
    before, after = (quality.metrics(some) for some in parts)
    gone = after.drop(index=EVIL)
    page = curation.report({"read": before, "policy": after, "kept": gone}, tmp_path / "quality.html").read_text()
    assert EVIL not in page and "&lt;script&gt;" in page
    assert "policy, web: median words" in page and "kept, web: median words" in page
    assert [path.name for path in tmp_path.iterdir()] == ["quality.html"]


def test_a_stage_that_leaves_nothing_is_told_with_zeros(parts, tmp_path):
    nothing = tmp_path / "nothing.parquet"
    pq.write_table(pq.read_table(parts[0][0]).slice(0, 0), nothing)
    left = quality.metrics([nothing])
    assert left.empty
    page = curation.report({"read": quality.metrics(parts[0]), "policy": left}, tmp_path / "quality.html").read_text()
    assert "policy, web: documents" in page and "policy, web: median words" not in page
