"""The authors' detector as they released it (tensorflow/tpu, models/official/detection, projects/vild): what differs
from Detectron2, a convention a module, so that their weights give their numbers. configs/LVIS/released/ chooses these
parts; ``convert.py`` beside brings the weights.

What needs no part of its own: anchors (as Detectron2's, with width over height 1, 2, 1/2 in this order), the ResNet
behind its stem, the box and the mask head's layers (biases and BatchNorms that Detectron2's have no place for are
folded into what they have: ``convert.py``), the classifier, and the ensemble's rule: the released
(d c ((1 - m) d + m c))^(1/3), with m = 1 on base names and 0 on novel ones, is eq. 5 with weight 2/3.
"""

from vild.modeling.released import backbone, rcnn, roi_heads, rpn

__all__ = ["backbone", "rcnn", "roi_heads", "rpn"]
