import pytest

from tests.apps.run_tool import runner


@pytest.fixture
def demo(world, checkpoint_file, teacher_folder, capsys):
    return runner("demo", checkpoint_file, teacher_folder, capsys)


@pytest.fixture
def images(world):
    return sorted((world / "glyphs" / "val").glob("*.jpg"))
