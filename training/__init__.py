"""Shards -> one trained CLIP.  Imports pipeline only; one process, one device.

    from training.config import TrainConfig
    from training.run import train
    manifest = train(TrainConfig(model="winnow-vit-tiny", samples=25_600), data="shards/", out="runs/first")

A run directory holds

    checkpoint.pt     {"state_dict": ...}: what `open_clip.create_model(name, pretrained=PATH)` loads
    model.json        {"architecture": name}, so that the folder itself is a model string for every other stage
    metrics.jsonl     one line every `log_every_steps` steps: step, samples, loss, learning_rate, logit_scale,
                      grad_norm, samples_per_s
    manifest.json     written last: config, parents, where every row went, final loss; holds no time
    resume.pt         only while unfinished: weights, optimiser, step; safe tensors, never unpickled

The files, in the order data flows:

    config.py      TrainConfig, and which of its fields decide the weights; FineTune
    start.py       fresh weights, or which ones
    index.py       tars -> where each row's image lies and its tokens
    captioned.py   several sets, some of them classes with caption templates -> one index; held-out rows
    order.py       (seed, position) -> row and random numbers; pure, so the position is all the data state there is
    images.py      image bytes -> cropped, augmented pixels -> normalised floats, as open_clip's transform gives them
    data.py        index + order -> batches, prefetched
    loss.py        the contrastive loss
    optim.py       AdamW groups, warmup-cosine, the clamp of the logit scale
    checkpoint.py  save and load weights and unfinished runs
    metrics.py     the lines of metrics.jsonl
    run.py         one run, top to bottom
    ensemble.py    weights of two runs -> their mixture
    retrieval.py   a model and the held-out rows -> recall@1

What one can rely on.  The budget is exact: `samples` are seen, each row floor or ceil of its share, and of several sets
each has exactly its share of every epoch.  The same config and data give the same weights, whatever the number of
loader processes, and on a CPU in fp32 bit for bit, also after any number of kills and reruns.  A row that cannot be
used is counted by reason in the manifest, not lost in silence.
"""
