"""JupyterLab as `make lab` opens it: what it would ask or fetch by itself is turned off."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OVERRIDES: dict[str, dict[str, Any]] = json.loads((ROOT / "notebooks/.overrides.json").read_text())


def test_the_news_pop_up_is_off_and_the_environment_gets_the_file() -> None:
    assert OVERRIDES["@jupyterlab/apputils-extension:notification"] == {"fetchNews": "false", "checkForUpdates": False}
    made = (ROOT / "Makefile").read_text()
    assert "cp notebooks/.overrides.json .venv/share/jupyter/lab/settings/overrides.json" in made


@pytest.mark.parametrize("plugin", OVERRIDES)
def test_each_setting_is_one_that_this_jupyterlab_knows(plugin: str) -> None:
    """JupyterLab passes over what it does not know, and would ask again."""
    pytest.importorskip("jupyterlab")
    jsonschema = pytest.importorskip("jsonschema")
    extension, name = plugin.split(":")
    path = Path(sys.prefix) / f"share/jupyter/lab/schemas/{extension}/{name}.json"
    assert path.is_file(), f"no plugin {plugin}"
    schema = json.loads(path.read_text())
    assert OVERRIDES[plugin].keys() <= schema["properties"].keys()
    jsonschema.validate(OVERRIDES[plugin], schema)
    broken = dict.fromkeys(OVERRIDES[plugin], 17)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
