"""The model card of a detector: a README.md with what its files record, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import yaml
from tabulate import tabulate
from torch import nn

from vild.checkpoint.checkpointer import detector_hash, read_network_record
from vild.utils.errors import UserError
from vild.utils.fingerprint import describe
from vild.utils.untrusted import parse_json, read_bytes, refused_as

# Beside weights and calibration, what decides a detection
AT_TEST = (
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "MODEL.RPN.NMS_THRESH",
    "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.VILD.TEMPERATURE",
    "MODEL.VILD.TEST_TEMPERATURE",
    "MODEL.VILD.ENSEMBLE_WEIGHT",
    "MODEL.VILD.PRE_NMS_TOPK",
    "TEST.DETECTIONS_PER_IMAGE",
)

CARD = """---
{data}
---

# {title}

An open-vocabulary object detector, trained by distillation (ViLD, [arXiv 2104.13921](https://arxiv.org/abs/2104.13921)).

```python
from vild import OpenVocabularyDetector

detector = OpenVocabularyDetector.from_pretrained("hf-hub:{repository}")
found = detector("photo.jpg", "umbrella, chess knight")
```

{facts}

## Metrics

{metrics}
"""


def model_card(cfg, model: nn.Module, repository: str, licence: str, run: str | Path | None = None) -> str:
    """Markdown; licence and metrics are also in the front matter, as the hub searches and shows them.

    Args:
        cfg: of the detector, with its ``MODEL.WEIGHTS``.
        model: the ViLDRCNN of it.
        repository: OWNER/NAME on the hub.
        licence: an identifier of the hub, such as "apache-2.0" or "cc-by-4.0".
        run: output folder of the training or evaluation whose metrics are quoted.

    Raises:
        UserError: ``run`` has no metrics, or they cannot be read, or are of another detector.
    """
    from huggingface_hub import EvalResult, ModelCardData

    heads, vocabulary = model.roi_heads, model.vocabulary
    splits, trained_on = vocabulary.splits, read_network_record(cfg.MODEL.WEIGHTS)["trained_on"]
    facts = [
        ("variant", f"{heads.variant}, backbone {cfg.MODEL.BACKBONE.NAME}"),
        ("names", f"{len(splits):,}: {splits.count('base'):,} annotated, {splits.count('novel'):,} held out"),
        ("teacher", describe(vocabulary.fingerprint)),
        ("trained on", "; ".join(_data(trained_on)) if trained_on else "not recorded"),
        ("calibrated", "no" if (c := heads.calibration) is None else f"on {c.data_set}"),
    ]
    metrics, title, task = _metrics(run, model, cfg), repository.rpartition("/")[2], "zero-shot-object-detection"
    results = []
    for key, value in metrics.items():
        name, metric = key.split("/", 1)
        results.append(EvalResult(task, dataset_type=name, dataset_name=name, metric_type=metric, metric_value=value))
    named = {"model_name": title, "eval_results": results} if results else {}
    return CARD.format(
        data=ModelCardData(license=licence, library_name="vild", pipeline_tag=task, **named).to_yaml(),
        title=title,
        repository=repository,
        facts=tabulate(facts, ["", ""], tablefmt="github", disable_numparse=True),
        metrics=tabulate(metrics.items(), ["data set / metric", "value"], tablefmt="github", floatfmt=".1f")
        if metrics
        else "None were given.",
    )


def _data(trained_on: dict) -> Iterator[str]:
    """The data sets of a training record and of the networks it started from."""
    for data_set in trained_on["data_sets"]:
        counts = data_set["annotations"]
        yield (f"{data_set['name']} ({data_set['file']}, SHA-256 {data_set['sha']}...): {sum(counts.values()):,} "
               f"annotations of {len(counts):,} names")  # fmt: skip
    for start in trained_on["starts"]:
        before = "; ".join(_data(start["trained_on"])) if start["trained_on"] else "not recorded"
        yield f"starting from {start['file']} ({before})"


def _metrics(run: str | Path | None, model: nn.Module, cfg) -> dict[str, float]:
    """Percent by DATA SET/IOU TYPE/METRIC."""
    if run is None:
        return {}
    path = Path(run) / "inference" / "vild_metrics.json"
    with refused_as(f"model card: {path} is not a file of metrics"):
        values = {str(key): float(value) for key, value in parse_json(read_bytes(path)).items() if value is not None}
        if alone := [key for key in values if "/" not in key]:
            raise ValueError(f"'{alone[0]}' names no data set")
    record = path.with_name("run.json")
    with refused_as(f"model card: {record} is not the record of an evaluation"):
        run_record = parse_json(read_bytes(record))
        evaluated = run_record.get("detector")
    if evaluated is None:
        raise UserError(f"model card: {record} does not say which detector was evaluated, as it is of an "
                        "earlier version: evaluate again, with tools/train_net.py --eval-only")  # fmt: skip
    if evaluated != (this := detector_hash(model)):
        raise UserError(f"model card: {record} is of detector {evaluated}, this one is {this} (calibration makes "
                        "another one): its metrics are not this one's")  # fmt: skip
    with refused_as(f"model card: the config of {record} cannot be read"):
        then, now = (yaml.safe_load(text) for text in (run_record["config"], cfg.dump()))
        pairs = [(key, *(reduce(getitem, key.split("."), tree) for tree in (then, now))) for key in AT_TEST]
    if changed := [f"{key} {a}, here {b}" for key, a, b in pairs if a != b]:
        raise UserError(f"model card: {record} is of another evaluation: {'; '.join(changed)}")
    return values
