"""The package as an installer and a host see it: complete, light to import, arrows one way."""

import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "av", "safetensors", "rich")


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout


def test_importing_the_package_loads_nothing_heavy():
    loaded = run_python("import sys, layerloom; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_the_folder_imports_under_another_name(tmp_path):
    # ComfyUI loads the folder by its path, under a name made from it.
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "custom_node_x", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}]
)
module = importlib.util.module_from_spec(spec)
sys.modules["custom_node_x"] = module
spec.loader.exec_module(module)
import custom_node_x.engine.layered as layered
print(layered.LayeredPipeline.__module__, "layerloom" in sys.modules)
"""
    assert run_python(code).split() == ["custom_node_x.engine.layered", "False"]


def test_every_room_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    rooms = ("engine", "kernels", "starter")
    found = {
        ".".join(("layerloom", *folder.relative_to(ROOT).parts))
        for room in rooms
        for file in (ROOT / room).rglob("__init__.py")
        for folder in [file.parent]
    }
    assert listed == found | {"layerloom"}


def test_metadata_never_pins_torch():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*settings["dependencies"], *sum(settings["optional-dependencies"].values(), [])]
    assert not [entry for entry in wanted if re.match(r"torch\b.*==", entry)]
    assert not [entry for entry in settings["dependencies"] if entry.startswith("torch")]


def test_arrows_point_one_way():
    for file in (*ROOT.glob("kernels/**/*.py"), *ROOT.glob("engine/**/*.py")):
        text = file.read_text(encoding="utf-8")
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)
        assert not [name for name in imported if name.split(".")[0] in ("comfy", "comfy_api")], file
        assert not [name for name in imported if re.match(r"\.*nodes\b|layerloom", name)], file
        if "kernels" in file.relative_to(ROOT).parts:
            assert not [name for name in imported if re.match(r"\.+engine\b", name)], file
