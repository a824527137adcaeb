"""Imported once by the fork server: every rank is then forked from a process that has paid for these imports."""

import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from megatron.training import training  # noqa: E402, F401

import megatron.longseq.gpt  # noqa: E402, F401

torch.set_num_threads(1)
