"""The authors' detector as released (tensorflow/tpu, models/official/detection, projects/vild): what differs from
Detectron2, one convention per module, so that their weights give their numbers. configs/LVIS/released/ selects these
parts; ``vild/checkpoint/tensorflow.py`` converts the weights.

Nothing of their own is needed for: anchors (Detectron2's, with width over height 1, 2, 1/2 in this order), the ResNet
behind its stem, the layers of the box and the mask head (biases and BatchNorms that Detectron2's have no place for are
folded into others by the converter), the classifier, and the ensemble's rule: the released
(d c ((1 - m) d + m c))^(1/3), with m = 1 for base and 0 for novel names, is eq. 5 with weight 2/3.
"""
