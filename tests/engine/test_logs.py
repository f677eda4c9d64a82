"""Detectron2's writers, and what is mended of them."""

from detectron2.utils.events import CommonMetricPrinter, EventStorage

from vild.engine.logs import MetricPrinter, build_writers


def test_a_training_that_ends_just_after_it_has_printed():
    """Before the third step there is no history of times, and the printer takes them from its last two calls."""
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=1.0, lr=0.1)
        printer = MetricPrinter(100)
        printer.write()
        printer.write()  # again at the end of the training: a ZeroDivisionError in Detectron2's
        storage.step()
        assert printer._get_eta(storage) is not None


def test_the_others_are_detectron2s(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 19}\n{"itera')
    writers = build_writers(str(tmp_path), 10)
    assert [type(w).__name__ for w in writers] == ["MetricPrinter", "JSONWriter", "TensorboardXWriter"]
    assert isinstance(writers[0], CommonMetricPrinter)
    assert (tmp_path / "metrics.json").read_text() == '{"iteration": 19}\n'
