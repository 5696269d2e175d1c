"""Recipes are read, overridden and written back; what is wrong in one is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from planish.compiler.errors import CalibrationError, RecipeError, SelectionError
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.pipeline.recipe_schema import recipe_schema


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_given_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: a\nscheme: w4a4k4v4\ntargets: [rtx]\nsms: [86, 89]\n")
    recipe = Recipe.read(path, scheme="w3a3k3v3", lm_head=None, num_layers=2)
    assert (recipe.model, recipe.scheme, recipe.targets, recipe.sms) == ("a", "w3a3k3v3", ("rtx",), (86, 89))
    assert recipe.num_layers == 2


def test_written_recipe_reads_back(tmp_path: Path) -> None:
    recipe = Recipe(model="é", scheme="w2a16g128", targets=("ort", "rtx"), max_context=100, sms=(89,))
    recipe.write(tmp_path / "r.yaml")
    assert Recipe.read(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nscheme: w4a4\nshceme: b\n", "r.yaml:3: unknown setting 'shceme'; the settings are model, scheme"),
        ("model: a\n", "'scheme' is missing"),
        ("model: a\nscheme: w4a4\nnum_layers: two\n", "r.yaml:3: 'num_layers' is 'two'"),
        ("model: a\nscheme: w4a4\ntargets:\n- ort\n- tpu\n", r"r.yaml:5: 'targets\.1' is 'tpu'"),
        ("model: a\nmodel: b\n", "r.yaml:2: 'model' stands in line 1 as well"),
        ("model: a\noverrides:\n  .*: {}\n", "r.yaml:3: 'overrides..\\*' is {}: it says nothing"),
        (
            "model: a\noverrides:\n  .*:\n    knid: rotation\n",
            "r.yaml:4: unknown setting 'overrides..\\*.knid'; the settings are kind, form",
        ),
        ("model: a\nscheme: w4a4\ntargets: []\n", "'targets'"),
        ("- a\n", "not a mapping"),
        ("a: [\n", "cannot be read"),
        ("model: a\ndataset: 2024-13-01\n", "r.yaml:2: '2024-13-01' cannot be read as timestamp"),
        ("model: a\noverrides:\n  .*: {kind: 0x_}\n", "r.yaml:3: '0x_' cannot be read as int"),
        ("model: a\nseed: !!bool 7\n", "r.yaml:2: '7' cannot be read as bool"),
        ("model: a\nseed: !!timestamp x\n", "r.yaml:2: 'x' cannot be read as timestamp"),
        ("model: a\n[b]: c\n", "r.yaml:2: found unhashable key"),
    ],
)
def test_wrong_recipes_name_the_setting(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.read(write(tmp_path / "r.yaml", text))


def test_a_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: a\nscheme: w4a4\nnum_layers: 2\n")
    with pytest.raises(RecipeError, match=r"^'num_layers' is -1"):
        Recipe.read(path, num_layers=-1)


def test_overrides_need_a_policy_that_makes_transforms() -> None:
    overrides = {".*": {"kind": "rotation"}}
    for scheme, select in (("w4a4", "none"), ("w16a16", "auto")):
        with pytest.raises(SelectionError, match="overrides"):
            Recipe.read(model="a", scheme=scheme, select=select, overrides=overrides).parsed_policy()
    policy = Recipe.read(model="a", scheme="w4a4", overrides=overrides).parsed_policy()
    assert policy.overrides[".*"].kind == "rotation"


def test_the_schema_in_the_docs_is_that_of_the_code() -> None:
    path = Path(__file__).parents[3] / "docs" / "recipe.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == recipe_schema(), "make schema writes it anew"
    described = recipe_schema()["properties"]
    assert all("description" in each for each in described.values())


def test_every_recipe_in_the_examples_is_one() -> None:
    recipes = sorted((Path(__file__).parents[3] / "examples").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        recipe = Recipe.read(path)
        recipe.parsed_scheme()
        recipe.parsed_policy()


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path / "no.yaml")


def test_which_gpu_it_is_decides_nothing() -> None:
    settings = [
        Recipe(model="a", scheme="w4a4", device=device).decisive_settings() for device in ("cuda", "cuda:1", "cpu")
    ]
    assert settings[0] == settings[1]
    assert settings[0] != settings[2]
    assert settings[2] == Recipe(model="a", scheme="w4a4").decisive_settings()
    assert settings[2] != Recipe(model="a", scheme="w4a4", seed=1).decisive_settings()


def test_settings_of_engines_decide_nothing_before_they_are_built() -> None:
    recipe = Recipe(model="a", scheme="w4a4")
    engines = {"max_batch_size": 2, "max_input_len": 8, "sms": (89,), "plugins": "none", "tensorrt_version": "10.3"}
    other = Recipe(model="a", scheme="w4a4", targets=("ort", "rtx"), **engines)
    assert other.decisive_settings() == recipe.decisive_settings()
    assert other.engine_settings("ort") == recipe.engine_settings("ort") == {}
    limits = {"max_batch_size": 2, "max_input_len": 8}
    # What only the other engine has is none of an engine's.
    assert other.engine_settings("rtx") == {**limits, "sms": [89]}
    assert other.engine_settings("tensorrt") == {**limits, "plugins": "none", "tensorrt_version": "10.3"}
    assert Recipe(model="a", scheme="w4a4", max_context=64).decisive_settings() != recipe.decisive_settings()


def test_auto_follows_the_scheme() -> None:
    assert str(Recipe(model="a", scheme="w4a4").parsed_policy()) == "auto"
    assert str(Recipe(model="a", scheme="w16a16k4v4").parsed_policy()) == "none"
    assert str(Recipe(model="a", scheme="w16a16k4v4", select="none").parsed_policy()) == "none"


def test_a_plan_is_a_policy() -> None:
    policy = Recipe(model="a", scheme="w4a4", plan="some/plan.json").parsed_policy()
    assert (policy.name, policy.plan, str(policy)) == ("plan", Path("some/plan.json"), "plan:plan.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "best"}, "'best' is not a selection policy"),
        ({"select": "measured", "plan": "plan.json"}, "Leave out --plan or --select"),
        ({"scheme": "w16a16", "select": "kurtosis"}, "leaves linears in floating point"),
        ({"select": "none", "residual_rotation": True}, "what transforms stand on"),
        ({"scheme": "w16a16", "residual_rotation": True}, "leaves linears in floating point"),
        ({"scheme": "w16a16", "plan": "plan.json"}, "leaves linears in floating point"),
    ],
)
def test_policies_that_cannot_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Recipe(**{"model": "a", "scheme": "w4a4", **settings}).parsed_policy()


def test_only_the_default_length_shrinks_to_the_context() -> None:
    recipe = Recipe(model="a", scheme="w4a4")
    assert [recipe.calibration(context).seqlen for context in (None, 4096, 256)] == [512, 512, 256]
    asked = Recipe(model="a", scheme="w4a4", seqlen=300)
    assert asked.calibration(300).seqlen == 300
    with pytest.raises(CalibrationError, match="longer than the model's context of 256"):
        asked.calibration(256)


@pytest.mark.parametrize(
    ("scheme", "settings", "bits"),
    [
        ("w2a16", {"avg_bits": 2.3}, 3),
        ("w2a16g64", {"avg_bits": 2.5}, 3),
        ("w2a16", {"avg_bits": 2.6}, 4),
        ("w2a16", {"hic_ratio": 0.25}, 4),
        ("w2a16", {"avg_bits": 2.3, "hic_bits": 4}, 4),
        # The kernels for integers take no others.
        ("w2a2k2v2", {"avg_bits": 2.3}, 4),
        ("w3a16", {"avg_bits": 3.2}, 4),
        ("w4a4k4v4", {"avg_bits": 4.3}, 8),
    ],
)
def test_bits_of_high_impact_channels(scheme: str, settings: dict[str, Any], bits: int) -> None:
    policy = Recipe(model="a", scheme=scheme, **settings).parsed_high_policy()
    assert policy is not None
    assert policy.bits == bits
