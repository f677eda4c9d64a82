#!/usr/bin/env python3
"""Write the proposals of a trained class-agnostic network (or of any detector) for a data set.

    tools/make_proposals.py --config-file configs/Glyphs/proposals.yaml --dataset glyphs_train \\
        --output output/quickstart/proposals.safetensors MODEL.WEIGHTS output/quickstart/proposals/model_final.pth
"""

import argparse

import torch
from tqdm import tqdm

from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.data import datasets
from vild.data.loader import build_test_loader
from vild.data.proposals import save_proposals
from vild.data.unreadable import REASON
from vild.modeling import build_model
from vild.utils.errors import UserError, one_line_errors
from vild.utils.lock import only_writer


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args()
    with only_writer(args.output):
        make(args)


def make(args):
    cfg = load_config(args.config_file, args.opts)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS is empty: give the trained proposal network")
    datasets.register_all()
    loader = build_test_loader(cfg, args.dataset)
    model = build_model(cfg).eval()
    provenance = {
        "data_set": args.dataset,
        "pictures": datasets.images_hash(args.dataset),
        "network": VildCheckpointer(model).load_recorded(cfg.MODEL.WEIGHTS),
    }

    proposals, unreadable = {}, {}
    with torch.inference_mode():
        for inputs in tqdm(loader, desc="proposals"):
            for given, output in zip(inputs, model(inputs), strict=True):
                if REASON in given:
                    unreadable |= given[REASON]
                    proposals[given["image_id"]] = torch.zeros(0, 4), torch.zeros(0)
                    continue
                found = (output["proposals"] if "proposals" in output else output["instances"]).to("cpu")
                if found.has("proposal_boxes"):
                    boxes, scores = found.proposal_boxes.tensor, found.objectness_logits.sigmoid()
                else:
                    boxes, scores = found.pred_boxes.tensor, found.scores
                keep = scores.argsort(descending=True, stable=True)[: cfg.TEST.PROPOSALS_PER_IMAGE]
                proposals[given["image_id"]] = boxes[keep], scores[keep]
    save_proposals(args.output, proposals, provenance)
    total = sum(len(boxes) for boxes, _ in proposals.values())
    print(f"{total} proposals of {len(proposals)} images: {args.output}")
    for why in unreadable.values():
        print(f"NO PROPOSALS: {why}")


if __name__ == "__main__":
    main()
