"""A Croissant 1.1 card with the responsible-AI vocabulary beside every data set of a run, made and read back offline.

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html, https://docs.mlcommons.org/croissant/docs/croissant-rai-spec.html
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stackpkg import runs
from stackpkg.data import manifest

EXTRA = "data cards need mlcroissant: pip install 'stackpkg[governance]'"
PARQUET, BINARY = "application/x-parquet", "application/octet-stream"
TYPES = {"bool": "BOOL", "int64": "INTEGER", "double": "FLOAT", "float": "FLOAT"}  # any other column that is flat: text
SETS = {  # what notebook 13 makes beside the corpus
    "pairs": ("Docstrings as queries, the functions they belong to, and hard negatives", "retrieval"),
    "preferences": ("Prompts with a preferred and a rejected continuation", "preference losses"),
    "conversations": ("Conversations with roles, tools and protected scopes", "safety conformance"),
    "long_range": ("Synthetic tasks whose answer lies beyond the local window", "long-range reading"),
}
NEEDED = (  # of Croissant, whose url and creator are of a set that is published, and of its vocabulary
    "name", "description", "license", "datePublished", "conformsTo", "rai:dataCollection", "rai:dataCollectionType",
    "rai:dataPreprocessingProtocol", "rai:dataAnnotationProtocol", "rai:dataBiases", "rai:dataUseCases",
    "rai:dataLimitations", "rai:dataSocialImpact", "rai:personalSensitiveInformation",
    "rai:dataReleaseMaintenancePlan",
)  # fmt: skip


def _library() -> Any:
    try:
        import mlcroissant
    except ImportError as error:
        raise ValueError(f"{EXTRA} ({error})") from None
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every recommended field that is empty
    return mlcroissant


def _shared(known: dict[str, Any]) -> dict[str, Any]:
    """What holds for every data set of the run."""
    data, privacy = known["parameters"]["data"], known["privacy"]
    found = ", ".join(f"{n['left']} {kind}" for kind, n in privacy["all"].items() if n["left"]) or "nothing"
    return {
        "version": f"{known['manifest']['format']}.0.0",
        "date_published": known["built"],
        "cite_as": f"Run {known['run']}, records with SHA-256 {known['records_sha256']}",
        "data_annotation_protocol": ["Nobody annotated by hand; language and trust are computed"],
        "data_social_impact": "Not assessed by the run; the privacy decision beside it names who decided what",
        "data_release_maintenance_plan": f"Not released. The first record expires on {known['expiry'][0]}, the last on "
        f"{known['expiry'][1]}; `stackpkg withdraw` takes one out, `stackpkg takedown` tells what holds it",
        "personal_sensitive_information": [
            f"Masked before training: {privacy['masked_by_scrubber'] or 'nothing'}",
            f"Left, by a second detector over {privacy['records']} records: {found}",
            privacy["not_looked_for"],
        ],
        "data_limitations": [
            "Only what its sources hold; licences are read from metadata, not by a lawyer",
            f"Documents whose licence is unknown: {known['unlicensed']}",
        ],
        "data_preprocessing_protocol": [
            f"At least {data['min_words']} words, at most {data['max_document_kb']} kB",
            f"Heuristics by domain: {data['filters']}",
            f"Near-duplicates at a Jaccard of {data['jaccard']} removed; trust of at least {data['min_trust']}",
            f"Dropped, by reason: {dict(known['rejected'])}",
        ],
    }


def _fields(mlc: Any, name: str, file: Path, source: dict[str, str]) -> Any:
    columns = [(each.name, str(each.type)) for each in pq.read_schema(file)]
    return mlc.RecordSet(id=name, name=name, fields=[
        mlc.Field(
            id=f"{name}/{column}", name=column, data_types=[getattr(mlc.DataType, TYPES.get(kind, "TEXT"))],
            source=mlc.Source(**source, extract=mlc.Extract(column=column)),
        )
        for column, kind in columns if "<" not in kind  # lists of tokens are told by the schema of the file
    ])  # fmt: skip


def _object(mlc: Any, name: str, sha256: str, kind: str) -> Any:
    return mlc.FileObject(id=name, name=name, content_url=name, encoding_formats=[kind], sha256=sha256)


def _card(mlc: Any, known: dict[str, Any], **about: Any) -> dict[str, Any]:
    context = mlc.Context(conforms_to=mlc_version())
    made = mlc.Metadata(ctx=context, **_shared(known) | about)
    return made.to_json()


def mlc_version() -> Any:
    from mlcroissant._src.core.context import CroissantVersion  # the library exports no name for it

    return CroissantVersion.V_1_1


def _records(mlc: Any, data: Path, shards: bool) -> dict[str, Any]:
    files = manifest.records(data)
    made = [_object(mlc, f"records/{file.name}", runs.digest(file), PARQUET) for file in files]
    entries = manifest.read(data)["shards"] if shards else []
    made += [_object(mlc, f"shards/{each['name']}.bin", each["sha256"], BINARY) for each in entries]
    made.append(mlc.FileSet(id="records", name="records", includes=["records/*.parquet"], encoding_formats=[PARQUET]))
    return {"distribution": made, "record_sets": [_fields(mlc, "documents", files[0], {"file_set": "records"})]}


def write(folder: runs.RunFolder, known: dict[str, Any]) -> list[Path]:
    """`data/<name>.jsonld` for the corpus, each of its sources and each set made from it; `known` is what
    `datacards.facts` counted. Raises `ValueError` without the extra, or for what is no valid card.
    """
    mlc, data, cards = _library(), folder.path / "data", dict[str, dict[str, Any]]()
    shares = known["manifest"]["mixture"]
    cards["corpus"] = _card(
        mlc, known, name=f"corpus-{known['run']}", license=[name for name, _ in known["counts"]["licence"]],
        description=f"Text of {len(known['sources'])} sources, filtered, deduplicated and split into token shards",
        in_language=[name for name, _ in known["counts"]["language"]],
        data_collection=f"{known['documents']} documents, dated {' to '.join(known['stamps'])}",
        data_collection_type=["Secondary Data analysis"],
        data_biases=[f"Share of training tokens by domain: {shares}"], data_use_cases=["Language modelling"],
        **_records(mlc, data, shards=True),
    )  # fmt: skip
    for number, source in enumerate(known["sources"]):
        cards[f"source_{number}"] = _card(
            mlc, known, name=source["name"], license=[name for name, _ in source["licence"]],
            description=f"The part of the corpus whose source begins with {source['name']!r}",
            in_language=[name for name, _ in source["language"]],
            data_collection=f"Read as {source['kind']}: {source['documents']} documents kept",
            data_collection_type=["Secondary Data analysis"],
            data_collection_missing_data=f"Not read or dropped, by reason: {dict(source['rejected'])}",
            data_biases=[f"Documents by domain: {dict(source['domain'])}"], data_use_cases=["Language modelling"],
            **_records(mlc, data, shards=False),
        )  # fmt: skip
    for name, (description, use) in SETS.items():
        if (file := data / f"{name}.parquet").exists():
            licences = (
                pq.read_table(file, columns=["licence"])["licence"].unique().to_pylist()
                if ("licence" in pq.read_schema(file).names)
                else ["Apache-2.0"]
            )  # fmt: skip  rules of this program made it
            cards[name] = _card(
                mlc, known, name=f"{name}-{known['run']}", description=f"{description}, made by rules from the corpus",
                license=[licence or "unknown" for licence in licences],
                data_collection=f"{pq.read_metadata(file).num_rows} rows made by this program",
                data_collection_type=["Software Collection"], data_biases=["Those of the corpus and of the rules"],
                data_use_cases=[f"Auxiliary objectives: {use}"],
                distribution=[_object(mlc, file.name, runs.digest(file), PARQUET)],
                record_sets=[_fields(mlc, name, file, {"file_object": file.name})],
            )  # fmt: skip
    return [runs.write_json(data / f"{name}.jsonld", card) for name, card in cards.items()]


def problems(cards: Iterable[Path]) -> list[str]:
    """What is wrong with cards, a line each, empty for none: invalid for mlcroissant, a field of the responsible-AI
    vocabulary that is missing, a file that is not what its card says, a record that can not be read."""
    mlc, found = _library(), list[str]()
    for path in cards:
        card = runs.read_json(path)
        found += [f"{path.name}: {name} is missing" for name in NEEDED if not card.get(name)]
        entries = [card["distribution"]] if isinstance(card["distribution"], dict) else card["distribution"]
        for entry in (entry for entry in entries if "sha256" in entry):
            file = path.parent / entry["contentUrl"]
            if not file.is_file() or runs.digest(file) != entry["sha256"]:
                found.append(f"{path.name}: {entry['contentUrl']} is not the file that the card describes")
        try:
            read = mlc.Dataset(jsonld=str(path))
            for records in read.metadata.record_sets:
                next(iter(read.records(records.uuid)))
        except (mlc.ValidationError, mlc.GenerationError, StopIteration, ValueError, OSError) as error:
            found.append(f"{path.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return found
