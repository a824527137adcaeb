"""Pretrain a GPT with upstream's own training loop: upstream's flags plus ours, real or mock data, CPU or GPU.

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --pipeline-model-parallel-size 2 --num-layers 4 ...

What a Megatron user looks for (get_batch, loss_func, forward_step, datasets) is in `megatron/longseq/pretrain_gpt.py`.
Everything stands behind the guard: upstream's checkpoint writer spawns helpers, and each imports this file again.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

    import patches

    patches.start()  # before upstream is imported: without CUDA its imports already ask for a device

    from megatron.longseq.pretrain_gpt import main

    main()
