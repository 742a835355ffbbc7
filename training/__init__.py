"""Shards -> one trained CLIP.  Imports pipeline only; one device a process.

    from training.config import TrainConfig
    from training.run import train
    manifest = train(TrainConfig(model="winnow-vit-tiny", samples=25_600), data="shards/", out="runs/first")

A run directory holds

    checkpoint.pt     {"state_dict": ...}: what `open_clip.create_model(name, pretrained=PATH)` loads
    model.json        {"architecture": name}, so that the folder itself is a model string for every other stage; with
                      "settings" where open_clip must be told more to make room for the weights (SigLIP's bias)
    metrics.jsonl     one line every `log_every_steps` steps: step, samples, loss, learning_rate, logit_scale,
                      grad_norm, samples_per_s, data_wait, tflop_per_s, mfu
    zeroshot.jsonl    with `zeroshot`: one line a point: step, samples, seconds, and the main metric of each task
    tensorboard/      event files with the same numbers, unless report_to says otherwise
    manifest.json     written last: config, parents, where every row went, final loss; holds no time
    resume-STEP.pt    only while unfinished, or with keep_checkpoints above 1: weights, optimiser, scaler, step; tensors
                      and numbers, never unpickled; `ARCHITECTURE@FILE` opens its weights
    captions.bin      only while unfinished: the features of a locked text tower
    .winnow-lock      only while a driver trains here: who it is (pipeline/lock.py)
    index.npz         only while unfinished: where each row lies in the tars, and the captions' tokens

The files, in the order data flows:

    config.py      TrainConfig, and which of its fields decide the weights; FineTune
    start.py       fresh weights, or which ones; another resolution, a locked text tower, checkpointed blocks
    processes.py   a function over many items in forked processes, in order
    index.py       tars -> where each row's image lies and its tokens
    captioned.py   several sets, some of them classes with caption templates -> one index; held-out rows
    index_file.py  that index, kept beside an unfinished run
    order.py       (seed, position) -> row and random numbers; pure, so the position is all the data state there is
    samplers.py    exact or datacomp: which rows a batch gets, copies of one row apart
    spool.py       remote shards -> local copies, brought before the steps that need them
    decode.py      image bytes -> pixels, faster than Pillow where they are the same
    images.py      pixels -> cropped, augmented, normalised floats, as open_clip's transform gives them
    data.py        index + order -> batches, prefetched
    text.py        captions cut to the longest of their batch, and the tower run on no more
    loss.py        the losses of CLIP and SigLIP
    locked.py      a locked text tower's features, made once
    optim.py       optimisers and their groups, warmup and schedule, the clamp of the logit scale
    world.py       the processes that torchrun started: who this is, what they agree on, gathered rows
    sharding.py    the optimiser's state spread over processes
    step.py        one batch -> one step, whole or in parts (gradient caching); gradients averaged over processes
    checkpoint.py  save and load weights and unfinished runs, in a thread
    stopping.py    SIGTERM -> a flag looked at between steps; losses that are back at guessing
    flops.py       what a sample costs and what a GPU could do
    metrics.py     the lines of metrics.jsonl
    zeroshot.py    the model in training, measured now and then -> the lines of zeroshot.jsonl
    reports.py     those lines -> TensorBoard, W&B
    run.py         one run, top to bottom
    ensemble.py    weights of two runs -> their mixture
    export.py      a model -> a folder that open_clip opens and the hub takes
    retrieval.py   a model and the held-out rows -> recall@1

What one can rely on.  The budget is exact: `samples` are seen.  With the sampler `exact` each row is seen floor or ceil
of its share, of several sets each has exactly its share of every epoch, and copies of a row are in different batches.
The same config and data give the same weights, whatever the number of loader processes (of training
processes: to rounding), and on a CPU in fp32 bit for
bit, also after any number of kills and reruns.  A row that cannot be used is counted by reason in the manifest, not
lost in silence.
"""
