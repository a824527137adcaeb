"""Pretrain a GPT with upstream's own training loop: upstream's flags plus ours, real or mock data, CPU or GPU.

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --pipeline-model-parallel-size 2 --num-layers 4 ...

get_batch, loss_func, forward_step and the datasets are in `megatron/longseq/pretrain_gpt.py`. All code is behind the
guard, because upstream's checkpoint writer spawns processes that import this file again.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without installation

    import patches

    patches.start()  # before upstream is imported: its imports use the CUDA device, even if there is none

    from megatron.longseq.pretrain_gpt import main

    main()
