"""Run a tool that takes a detector's flags, in this process."""

import importlib.util

from tests.conftest import REPOSITORY


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def runner(name, checkpoint_file, teacher_folder, capsys):
    """A tool: what follows the detector's flags to (exit status, stdout, stderr)."""
    main = load_tool(name)

    def run(*arguments, opts=()):
        config = ["--config-file", REPOSITORY / "configs/Glyphs/vild.yaml"]
        opts = ["--opts", "MODEL.WEIGHTS", checkpoint_file, "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}",
                "MODEL.VILD.TEACHER.PRETRAINED", "random", "TEST.DETECTIONS_PER_IMAGE", 10, *opts]  # fmt: skip
        try:
            status = main([str(a) for a in (*config, *arguments, *opts)]) or 0
        except SystemExit as stopped:
            status = stopped.code
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def error_of(told) -> str:
    """The one line of a mistake."""
    status, _, stderr = told
    assert status == 2 and "Traceback" not in stderr, told
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and len(line) < 500
    return line
