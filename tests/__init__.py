"""Tests hide the GPUs of their machine, also from the commands that they start: numbers are compared to the last bit,
and two processes would ask for two GPUs. With VILD_TEST_GPU=1 they see them."""

import os

if not os.environ.get("VILD_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
