"""The tools' command lines: shared flags, quick answers, defaults and examples in every --help."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from functools import cache

import pytest
from detectron2.engine import default_argument_parser

from tests.conftest import REPOSITORY
from vild.inference.display import DisplayRules
from vild.utils.command_line import SHARED, THRESHOLD, training_parser

SCRIPTS = sorted([*(REPOSITORY / "tools").glob("*.py"), *(REPOSITORY / "datasets").glob("*.py")])
OWN_WORDS = ("benchmark.py", "quickstart.py", "ablate.py", "audit_leakage.py")  # which share no flag's meaning
RUNNER = ("--weights", "m.onnx", "--vocabulary", "v", "--input", "a.jpg", "--output", "r.json")
HEAVY = ("torch", "detectron2", "open_clip", "hotcoco", "gradio", "cv2", "timm")
ASK = """
import runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    print("status", end.code, [m for m in {heavy} if m in sys.modules], file=sys.stderr)
"""


@cache
def ask(script, *arguments: str) -> tuple[str, list[str]]:
    """stdout, and the lines of stderr."""
    command = [sys.executable, "-c", ASK.format(heavy=HEAVY), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_is_answered_before_anything_heavy_is_imported(script):
    stdout, stderr = ask(script, "--help")
    assert stdout.startswith("usage: ") and stderr == ["status 0 []"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_mistyped_or_abbreviated_flag_is_one_line_at_once(script):
    for flag in ("--hel", "--nothing"):
        _, (line, status) = ask(script, flag)
        assert status == "status 2 []"
        assert line.startswith(script.name) and ": error: " in line and line.endswith(" (see --help)")


@pytest.mark.parametrize(
    ("script", "arguments", "mistake"),
    [
        ("train_net.py", ["--num-gpus", "two"], "argument --num-gpus: invalid int value: 'two'"),
        ("evaluate.py", [], "the following arguments are required: --protocol, --gt, --results, --output-dir"),
        ("evaluate.py", ["--protocol"], "argument --protocol: expected one argument"),
        ("demo.py", ["--output", "x", "--webcam", "--devise\n"], "unrecognized arguments: --devise"),
        ("benchmark.py", ["crops", "--repeats", "x"], "argument --repeats: invalid int value: 'x'"),
        ("run_onnx.py", ["--threshold", "high"], "argument --threshold: invalid float value: 'high'"),
        ("demo.py", ["--threshold", "2"], "argument --threshold/--confidence-threshold: 2 is not between 0 and 1"),
        ("demo.py", ["--frames", "x"], "argument --frames: invalid int value: 'x'"),
        ("label.py", ["--threshold", "x"], "argument --threshold: invalid float value: 'x'"),
        ("label.py", ["--threshold", "nan"], "argument --threshold: nan is not between 0 and 1"),
        ("absent_words.py", ["--seed", "-1"], "argument --seed: -1 is less than 0"),
        ("demo.py", ["--frames", "0"], "argument --frames: 0 is less than 1"),
        ("web_demo.py", ["--port", "99999"], "argument --port: 99999 is more than 65535"),
        ("check_dataset.py", ["--num-workers", "-1"], "argument --num-workers: -1 is less than 0"),
        ("learn_prompts.py", ["--batch-size", "0"], "argument --batch-size: 0 is less than 1"),
        ("build_teacher_store.py", ["--nms", "2"], "argument --nms: 2 is not between 0 and 1"),
        ("run_onnx.py", [*RUNNER, "--top-k", "-1"], "argument --top-k: -1 is less than 1"),
        ("run_onnx.py", [*RUNNER, "--threshold", "2"], "argument --threshold: 2.0 is not between 0 and 1"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, mistake):
    stdout, (line, status) = ask(REPOSITORY / "tools" / script, *arguments)
    assert stdout == "" and status == "status 2 []"
    assert re.fullmatch(rf"{script}( \w+)?: error: {re.escape(mistake)} \(see --help\)", line)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_has_an_example_and_defaults(script):
    text, _ = ask(script, "--help")
    assert re.search(rf"(tools|datasets)/{script.name} ?", text), "no example"
    for flag, settings in SHARED.items():
        has_default = settings.get("default") not in (None, "", []) and script.name not in OWN_WORDS
        if has_default and re.search(rf"^  {flag}\b", text, re.MULTILINE):
            shown = re.search(rf"^  {flag}\b.*?(?=^  --|\Z)", text, re.MULTILINE | re.DOTALL)[0]
            assert "(default: " in " ".join(shown.split())


def test_shared_flags_look_alike_in_every_tool():
    for script in SCRIPTS:
        text = " ".join(ask(script, "--help")[0].split())
        for flag in ("--device", "--dataset", "--seed", "--num-workers"):
            if f" {flag} " in text and script.name not in OWN_WORDS:
                assert f"{SHARED[flag]['help'][:30]}" in text, f"{script.name} {flag}"


def test_the_training_flags_are_detectron2s():
    def described(parser: argparse.ArgumentParser) -> dict:
        keys = ("option_strings", "dest", "nargs", "default", "type", "required")
        return {a.dest: [getattr(a, k) for k in keys] for a in parser._actions}

    assert described(training_parser("")) == described(default_argument_parser())


def test_the_runner_without_torch_has_the_same_defaults():
    text, _ = ask(REPOSITORY / "tools" / "run_onnx.py", "--help")
    text = " ".join(text.split())
    assert f"of a detection (default: {THRESHOLD})" in text
    assert f"report all (default: {DisplayRules.across_names})" in text


def test_a_warning_is_its_message_only():
    """Also after open_clip has logged, whose ``logging.info`` gives the root logger a handler of another format."""
    code = """
import logging
from vild.utils.errors import one_line_errors

@one_line_errors
def main():
    logging.info("loaded")
    logging.getLogger("vild.apps").warning("a line")

main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "a line\n"
