"""The proposals of a trained class-agnostic network, or of any detector, for a data set."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.utils import comm
from tqdm import tqdm

from vild.checkpoint.checkpointer import VildCheckpointer
from vild.data import datasets
from vild.data.loader import build_test_loader
from vild.data.proposals import save_proposals
from vild.data.unreadable import REASON
from vild.engine.together import share_annotations
from vild.modeling import build_model
from vild.utils.errors import UserError, count_of


def make_proposals(cfg, dataset: str, output: Path) -> None:
    """Write the best ``TEST.PROPOSALS_PER_IMAGE`` boxes of each image, and print how many there are. Several processes
    share the images; the boxes are the same to within rounding. On a GPU the network computes in half precision if
    it was trained so (``SOLVER.AMP.ENABLED``).

    Raises:
        UserError: no weights, or an unknown data set.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS is empty: give the weights of the proposal network")
    datasets.register_all()
    share_annotations([dataset])
    loader = build_test_loader(cfg, dataset)
    model = build_model(cfg).eval()
    provenance = {
        "data_set": dataset,
        "pictures": datasets.images_hash(dataset),
        "network": VildCheckpointer(model, trained=True).load_recorded(cfg.MODEL.WEIGHTS),
    }
    arithmetic = torch.autocast(model.device.type, enabled=cfg.SOLVER.AMP.ENABLED)
    if comm.is_main_process():
        precision = arithmetic.fast_dtype if cfg.SOLVER.AMP.ENABLED else torch.float32
        print(f"proposal network on {model.device}, in {str(precision).removeprefix('torch.')}", flush=True)
    proposals, unreadable = {}, {}
    with torch.inference_mode(), arithmetic:
        for inputs in tqdm(loader, desc="proposals", disable=not comm.is_main_process()):
            for given, output_of in zip(inputs, model(inputs), strict=True):
                if REASON in given:
                    unreadable |= given[REASON]
                    proposals[given["image_id"]] = torch.zeros(0, 4), torch.zeros(0)
                    continue
                found = (output_of["proposals"] if "proposals" in output_of else output_of["instances"]).to("cpu")
                if found.has("proposal_boxes"):
                    boxes, scores = found.proposal_boxes.tensor, found.objectness_logits.float().sigmoid()
                else:
                    boxes, scores = found.pred_boxes.tensor, found.scores
                keep = scores.argsort(descending=True, stable=True)[: cfg.TEST.PROPOSALS_PER_IMAGE]
                proposals[given["image_id"]] = boxes[keep], scores[keep]
    shares = comm.gather((proposals, unreadable))
    if not comm.is_main_process():
        return
    proposals = {i: found for share, _ in shares for i, found in share.items()}
    unreadable = {file: why for _, share in shares for file, why in share.items()}
    save_proposals(output, proposals, provenance)
    total = sum(len(boxes) for boxes, _ in proposals.values())
    print(f"{count_of(total, 'proposal')} of {count_of(len(proposals), 'image')}: {output}")
    for why in unreadable.values():
        print(f"NO PROPOSALS: {why}")
