"""A grid is checked before anything runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from experiments.grid import read_grid

from tests.conftest import REPOSITORY
from vild.utils.errors import UserError

GRID = """
seeds: [0, 1]
iterations: 10
rows:
  ViLD: {config: vild}
  cosine: {config: vild, MODEL.VILD.OBJECTIVES: [{NAME: cosine}], MODEL.VILD.DISTILL_WEIGHT: 3.0}
  rotated: {evaluate: ViLD, novel_texts: rotated}
  oracle: {config: text, data: all}
  crops: {clip_on_crops: cosine}
"""


def read(tmp_path, text):
    (tmp_path / "grid.yaml").write_text(text)
    return read_grid(tmp_path / "grid.yaml")


def test_our_grids_that_share_a_folder_share_no_stage_of_different_settings():
    """Or the second one of ``make figures`` is refused, after hours."""
    commands = {entry["command"] for entry in yaml.safe_load((REPOSITORY / "tools/figures.yaml").read_text()).values()}
    found = {}  # by folder and stage
    grids = sorted({m.groups() for c in commands if (m := re.search(r"--grid (\S+) --output-dir (\S+)", c))})
    for path, folder in grids:
        grid = read_grid(REPOSITORY / path)
        for row in grid.rows:
            setting = (replace(row, name=""), grid.iterations)
            assert found.setdefault((folder, row.stage), setting) == setting, f"{path}: {row.name}"
    assert len(grids) == 5 and len(found) > 80


def test_a_grid_is_read(tmp_path):
    grid = read(tmp_path, GRID)
    assert grid.seeds == (0, 1) and grid.iterations == 10 and [r.name for r in grid.rows][1] == "cosine"
    assert dict(grid.rows[1].overrides)["MODEL.VILD.OBJECTIVES"] == [{"NAME": "cosine"}]
    for path in (Path("configs/Glyphs/ablations")).glob("*.yaml"):
        assert read_grid(path).rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {}", "rows is empty"),
        ("row: {}", "the allowed keys are"),
        (
            "rows: {a: {config: vild}, b: {evaluate: a}}\nshares: b",
            "shares: 'b': not the name of a row with a config",
        ),
        ("rows: {a: {config: vild}}\nshares: [a]", r"shares: '\['a'\]': not the name of a row with a config"),
        ("rows: {a: {config: vild, teachers: 2}}\nshares: a", "shares: 'a': this row has more than one teacher"),
        ("rows: {a: {config: text}}\nshares: a", "shares: 'a': this row's detector does not distil from a store"),
        ("rows: {a: {config: vild, MODEL.VILD.DISTILL_FROM: teacher}}\nshares: a", "'a': .* does not distil from a s"),
        ("rows: {a: vild}", "row 'a': vild is not a setting"),
        ("rows: {a: {config: vild, dta: all}}", "'dta' is not one of"),
        ("rows: {a: {config: vild, data: some}}", "data: some is not one of"),
        ("rows: {a: {data: all}}", "give one of config"),
        ("rows: {a: {evaluate: b}}", "'b': not the name of a row"),
        ("rows: {a: {evaluate: b}, b: {clip_on_crops: a}}", "'b': not the name of a row with a config"),
        ("rows: {a: {clip_on_crops: b}}", "'b': not the name of a row with a config"),
        ("rows: {a: {config: vild}, b: {clip_on_crops: true}}", "clip_on_crops: True is not a name"),
        ("rows: {a: {config: text, data: all}, b: {clip_on_crops: a}}", "'a': this row is not trained on data: train"),
        ("rows: {a: {config: text, data: heldout}, b: {evaluate: a}}", "'a': this row is not trained on"),
        ("rows: {a: {config: vild}, b: {clip_on_crops: a}, c: {clip_on_crops: a}}", "'b', 'c'\\] have clip_on_crops"),
        ("rows: {a b: {config: vild, data: all}, a-b: {config: text, data: all}}", "two rows"),
        ("rows: {a: {config: ensemble, data: all}}", "row 'a': data: all leaves no novel names"),
        ("rows: {a: {config: vild, teachers: 3}}", "teachers: 3 is not one of"),
        ("rows: {a: {config: vild, teachers: 2, data: all}}", "teachers needs data: train"),
        ("rows: {a: {config: vild, teachers: 2}, b: {evaluate: a}}", "more than one teacher"),
        ("rows: {a: {config: vild, teachers: 2}, b: {clip_on_crops: a}}", "more than one teacher"),
        ("rows: [", "grid"),
        ("rows: {a: {config: vild}}\nseeds: 3", "seeds: 3 is not a list"),
        ("rows: {a: {config: vild}}\nseeds: []", "is not a list of whole"),
        ("rows: {a: {config: vild}}\nseeds: [0, 1.5]", "is not a list of whole"),
        ("rows: {a: {config: vild}}\nseeds: [0, 1, 0]", "duplicate seed"),
        ("rows: {a: {config: vild}}\niterations: 1e3", "iterations: 1e3 is not a whole"),
        ("rows: {a: {config: vild}}\niterations: -1", "iterations: -1 is not a whole"),
        ("rows: {a: {config: [vild]}}", r"config: \['vild'\] is not a name"),
        ("rows: {a: {config: vlid}}", "config: 'vlid' is not one of .*students/resnet10t.* vild"),
        ("rows: {a: {evaluate: [b]}}", "evaluate: .* is not a name"),
        ("rows: {a: {config: vild, MODEL.VILD.OBJECTIVE: []}}", "row 'a': overrides.*OBJECTIVE"),
        ("rows: {a: {config: vild, SOLVER.MAX_ITER: many}}", "row 'a': overrides.*many"),
        ("rows: {a: {config: vild, MODEL.VILD.OBJECTIVES: [{NAME: l3}]}}", "row 'a': MODEL.VILD.OBJECTIVES: 'l3'"),
        ("rows: {a: {config: text, MODEL.VILD.OBJECTIVES: [{NAME: l3}]}}", "row 'a': MODEL.VILD.OBJECTIVES: 'l3'"),
        ("rows: {a: {config: vild, MODEL.VILD.OBJECTIVES: [{NAME: tokens}]}}", "row 'a': .*'tokens' needs"),
        (
            "rows: {a: {config: vild}, b: {evaluate: a, MODEL.MASK_ON: false}}",
            "'MODEL.MASK_ON' has no effect with eva",
        ),
        ("rows: {a: {config: vild}, b: {evaluate: a, data: all}}", "'data' has no effect with evaluate"),
        (
            "rows: {a: {config: vild}, b: {clip_on_crops: a, MODEL.MASK_ON: 1}}",
            "'MODEL.MASK_ON' has no effect with clip",
        ),
        ("rows: {a: {config: vild}, b: {clip_on_crops: a, teachers: 1}}", "'teachers' has no effect with clip"),
        ("rows: {a: {config: vild}, a: {config: text}}", "line 1: duplicate key 'a'"),
        ("rows: {a: {config: vild, 1: 2}}", "row 'a': key 1 is not text"),
        ("rows: {a|b: {config: vild}}", r"row 'a\|b': tables and plots cannot show this name"),
        ("rows: {a: {config: proposals}}", "config: 'proposals' is not one of ensemble, image, students/"),
        ("rows: {a: {config: vild, SEED: 1}}", "row 'a': 'SEED' is set by the stages; use seeds"),
        ("rows: {a: {config: vild, DATASETS: {TEST: []}}}", "row 'a': 'DATASETS' is set by the stages"),
        ("rows: {a: {config: text, teachers: 2}}", "row 'a': .* the variant 'text' distils from no teacher"),
        (
            "rows: {a: {config: vild, teachers: twice, MODEL.VILD.DISTILL_FROM: teacher}}",
            "row 'a': .* DISTILL_FROM is 'teacher'",
        ),
        ("rows: {a: {config: vild, MODEL.VILD.SEVERAL_TEACHERS.BY: average}}", "row 'a': .*TEACHERS is empty"),
        (
            "rows: {a: {config: vild, teachers: 2, MODEL.VILD.SEVERAL_TEACHERS.BY: average}}",
            "row 'a': .* needs soft_targets or",
        ),
        (
            "rows: {a: {config: vild, MODEL.VILD.VARIANT: text, MODEL.VILD.OBJECTIVES: [{NAME: cosine}]}}",
            "row 'a': MODEL.VILD.OBJECTIVES has no effect",
        ),
        ("rows: {a: {config: students/resnet10t}}", "row 'a': .* add MODEL.WEIGHTS"),
        ("rows: {a: {config: students/resnet10t, MODEL.VILD.TIMM_BACKBONE: renset}}", "timm has no model 'renset'"),
        ("rows: {a: {config: vild, MODEL.VILD.VARIANT: vlid}}", "row 'a': MODEL.VILD.VARIANT: 'vlid' is not"),
        ("rows: {a: {config: vild, TEST.PATIENCE: 2}}", "row 'a': TEST.PATIENCE is 2"),
        ("rows: {a: {config: vild, novel_texts: rotated}}", "'novel_texts' has no effect with config"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
