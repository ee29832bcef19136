"""Every knob once, with its unit and source; experiments start from here.

Trains SiT-tiny on synthetic images: a check that everything runs, not an experiment.
  python main.py --config=configs/base.py --workdir=runs/base --mode=train
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The base configuration: a plain SiT; no mechanism is switched on."""
  return ConfigDict(
    {
      # Of parameters, data order, budgets, times, noise and dropped labels.
      "seed": 0,
      # Devices along (data, fsdp, tensor): copies of the model, shards of its arrays,
      # shards of its heads and MLP columns. -1: all that remain.
      "mesh": (-1, 1, 1),
      "model": {
        "preset": "SiT-tiny/2",  # FAMILY-SIZE/PATCH, see elit_jax/models/presets.py
        "classes": 10,  # besides the null label
        # Of queries and keys: none | head_ln (LayerNorm) | head_rms | full_rms (over
        # all heads); "": the family's own.
        "qk_norm": "",
        # sincos (a table) | rope (rotations) | both; "": the family's own.
        "positions": "",
        "dtype": "float32",  # of matmuls; all else stays float32
        # What the backward pass keeps of a block: none (recompute nothing, keep all) |
        # dots (keep what linear layers return) | full (keep its input, recompute all).
        "remat": "dots",
        "attention": "auto",  # kernel: auto | xla | cudnn | splash
        "scan": True,  # False unrolls the blocks, for debugging
      },
      "data": {
        "source": "synthetic",  # see elit_jax/data/sources.py
        "path": "",  # of shards and foreign: their folder; docs/data.md
        "shape": (8, 8, 1),  # of a sample: (*space, channels)
        # Samples of half that size, their patches apart on an empty canvas: ELIT's
        # experiment with four times the tokens. "" | whole (all is noised and learnt) |
        # real (the empty places stay empty, and have no loss).
        "spread": "",
        "vae": "",  # whose latents the samples are: sd | flux | tiny; "": none
        "dtype": "float32",  # as stored: float32 | float16 (latents) | uint8 (pixels)
      },
      # What a training step may cost, drawn anew each step (DESIGN: "k4" latents a
      # group, "n64" an image, "25%" of all). "50% in [0.5, 1]": at those times alone,
      # docs/plans.md. Weights () means uniform; with intervals, the share of times in
      # each.
      "budgets": ("100%",),
      "budget_weights": (),
      "flow": {
        # linear | cosine | vp | ddpm (DiT's thousand steps, which its presets need) |
        # sd (Stable Diffusion's, for the weights of U-ViT's authors)
        "path": "linear",
        "time": "logit_normal",  # uniform | logit_normal
        # Of those times towards noise: t' = s t / (1 + (s - 1) t). A number (1: none) |
        # resolution (Qwen-Image's, by the number of tokens).
        "shift": "1",
        "label_dropout": 0.1,  # share of labels replaced by the null label
        # mse | l2norm (FlexiDiT's, not squared): the distance to what the network
        # predicts at its first patch size is all that the others learn from; "": data.
        "distill": "",
      },
      "train": {
        "steps": 100,
        "batch_size": 32,  # examples a step, over all devices
        "accumulation": 1,  # micro-batches a step
        "log_every": 10,  # steps
        "preview_every": 0,  # steps between sample grids; 0: none
        "max_bad_steps": 10,  # non-finite gradients in a row before training stops
      },
      "wandb": "",  # project at Weights & Biases that gets all rows, too; "": none
      # Steps to trace into <workdir>/profile, FIRST:LAST as Python counts: "100:105" is
      # the five that follow step 100; "": none.
      "profile": {"steps": ""},
      "optim": {  # DiT, sec. 4; ELIT's training script
        "lr": 1e-4,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,  # largest global norm of the gradient
        "warmup": 0,  # steps
        # Averages of weights, saved side by side: "0.9999" (decay a step), "power 0.05"
        # (EDM2's power function, of this width relative to the run).
        "ema": ("0.9999",),
        # What is trained: a regular expression found in the paths of parameters, such
        # as "^sizes/" (what other patch sizes have for themselves); "": all of them.
        "only": "",
      },
      "checkpoint": {
        "every": 50,  # steps
        "keep": 2,  # newest checkpoints kept
        "keep_every": 100_000,  # steps; such checkpoints are kept for ever
      },
      "sample": {
        "count": 64,  # images
        "batch_size": 32,
        # Phases written out, such as "20@k4 20@k8, cfg 2 in [0.1, 0.9]", docs/plans.md;
        # "": one phase by steps, budgets, reuse and guidance.
        "plan": "",
        "steps": 40,  # ELIT, sec. 4: 40 Euler steps
        # euler | heun | rk5 (six evaluations a step) | dpm++ | sde FORM NORM | ddpm |
        # ddim ETA; all but the name may be left out, see docs/maths.md. Their authors
        # sample DiT with "ddpm", SiT with "sde sigma", both in 250 steps.
        "solver": "euler",
        # Of its grid of times, as flow.shift; the last time before the end may follow
        # (Qwen-Image: resolution 0.02), to which all others are stretched.
        "shift": "1",
        # TeaCache: an evaluation is replaced by what the last one added, while less has
        # changed since then than this (docs/plans.md); 0: every evaluation is run.
        "reuse": 0.0,
        "budgets": ("100%",),
        "classes": (),  # such as (207, 360), drawn in turn; (): all
        # Latents become pictures by this safetensors of data.vae (random:SEED: a
        # rehearsal); "": they stay latents.
        "decoder": "",
        "uint8": "dit",  # rounding: dit (127.5 x + 128) | elit (255 (x + 1) / 2)
        # Which average; "": the first of optim.ema. "power 0.07" is rebuilt from the
        # other power functions in all checkpoints kept, if it is not among them.
        "ema": "",
        "seed": 0,
      },
      "guidance": {
        "scale": 1.0,  # 1: none; 0 to 1: between the weak branch and the strong one
        "label": "null",  # of the weak branch: null (CFG, CCFG) | same (AutoGuidance)
        "budget": "",  # of the weak branch; "": that of the strong one
        "low": 0.0,  # guided at times low <= t <= high, t = 1 is noise
        "high": 1.0,
        "channels": "all",  # all | three: the first three alone, as DiT and SiT sample
        # Both branches run as: auto | batch (equal budgets) | calls | packed (in one
        # sequence) | padded (a batch of twice the size) | rows (several weak sequences
        # in one row). The results are equal.
        "way": "auto",
      },
      # Of --mode=plan: what an image may cost, and what is tried to stay within it.
      "plan": {
        "target": "",  # such as 12ms | 2.5TF | 40% (of steps at the largest budget)
        "steps": (),  # numbers of steps; (): a ladder up to sample.steps
        "segments": 2,  # parts of a run that may have different budgets, at most
        "reuse": (),  # thresholds of TeaCache, besides 0; (): those calibrated
      },
      "eval": {
        "draws": 16,  # noise draws for each held-out image; 0: no validation loss
        "count": 500,  # samples of a row: a budget, or a guidance
        "guidance_scale": 2.0,  # of the guided rows
        "seed": 1,
        # budgets (every training budget) | guidance (CFG, cheap CFG and AutoGuidance) |
        # sampled (what --mode=sample draws)
        "rows": ("budgets", "guidance"),
        "labels": "balanced",  # balanced (index modulo classes) | random (uniform)
        # Of samples, see docs/evaluation.md: fid | sfid | is | precision | recall | ...
        "metrics": (),
        "features": (),  # networks that they look through: inception | dino-l | ...
        "weights": (),  # a file or hub:OWNER/NAME/FILE for each of these
        # Statistics of real images, by --mode=statistics or in the layout of ADM; "":
        # of the training images themselves, where the data are pixels.
        "reference": "",
        "bootstrap": 25,  # replicates behind the standard error of a Frechet distance
        "every": 0,  # training steps between evaluations of `count` samples; 0: none
        # Of --mode=sweep: numbers of steps and guidance scales, besides the above.
        "sweep_steps": (),
        "sweep_scales": (),
        "sweep_reuse": (),  # thresholds of TeaCache
        # Shares of the steps, from noise on, at a smaller budget before a larger one.
        "sweep_weak": (),
        "sweep_seeds": 0,  # seeds of schedules over noise levels; 0: no such rows
      },
      # Of --mode=inspect: what Read attends to, and what its latents are worth.
      "inspect": {
        "count": 64,  # held-out images
        "levels": 8,  # noise levels, evenly in (0, 1)
      },
      # Of --mode=prepare, which makes the shards that `data` describes, in data.path.
      "prepare": {
        "source": "",  # images: a folder, tar, zip, ... see elit_jax/data/listings.py
        "kind": "auto",  # of that source
        "split": "train",  # of a TFDS dataset; no other source has any
        "crop": "center-dhariwal",  # center | center-dhariwal (ADM's) | wide | none
        "resolution": (),  # (width, height) of the crop; (): that of data.shape
        "flip": False,  # a mirrored copy of every image, too
        "weights": "",  # of data.vae: safetensors, or random:SEED as a rehearsal
        "format": "raw",  # raw (read fastest) | array_record
        "shard_size": 4096,  # images
        "batch_size": 64,  # images encoded at once, over the devices of a process
        "workers": 0,  # threads that decode; 0: one a processor
        "max_skipped": 100,  # images that cannot be used before it stops
      },
    }
  )


def flexi(patches: tuple[str, ...], **fields: Any) -> ConfigDict:
  """What `config.flexi` is where there are several patch sizes; fields: other knobs."""
  return ConfigDict(
    {
      "patches": patches,  # besides the preset's, as budgets have them: "p4", "p1x4x4"
      # shared (one of the largest size, resized for each) | own (of each size; the
      # network's own stay as they are)
      "kernels": "shared",
      "rank": 0,  # of adapters (LoRA) of each size, in attention and MLPs; 0: none
      "embedding": True,  # a learned vector of the size is added to every token
      "norm": True,  # tokens of these sizes pass two more LayerNorms
      "align": "corner",  # where in its patch a token stands: corner | center
    }
    | fields
  )


def mmd(**fields: Any) -> ConfigDict:
  """What `config.mmd` is where training takes steps of the sampler, at the largest
  patch size and then at the smallest (FlexiDiT, sec. 3.3); fields: other knobs.
  """
  return ConfigDict(
    {
      "weight": 1.0,  # of the discrepancy beside the loss at the step's budget
      "steps": 250,  # of a whole run of sample.solver; some of them are taken
      "weak": 4,  # steps at the largest patch size
      "powerful": 2,  # steps at the smallest one, which follow
      # Where on that grid they end: logit_normal (sigmoid of N(-1, 1), from data on) |
      # square (of a uniform number) | uniform.
      "early": "logit_normal",
      "kernel": "rbf",  # rbf | laplace | energy (which has no bandwidth)
      "bandwidths": (0.25, 0.5, 1.0, 2.0, 4.0),  # the sum of kernels of these units
      "unit": "median",  # median | mean (of distances in both batches) | one
      "unbiased": True,  # False: a sample is compared with itself, too
    }
    | fields
  )


def elit(window: tuple[int, ...], head: int, tail: int, **fields: Any) -> ConfigDict:
  """What `config.elit` is where the latent interface is used; fields: other knobs."""
  return ConfigDict(
    {
      "window": window,  # tokens of a group along each axis
      "head": head,  # blocks before Read
      "tail": tail,  # blocks after Write
      "read": "cross",  # cross | qformer | self, see docs/maths.md
      "read_depth": 1,  # layers
      "write": "cross",  # cross | self
      "write_depth": 1,
      "mlp_ratio": 1.0,  # of the MLPs of both
      "sees": "all",  # latents that Write attends to: all | kept
      "cross": "drop",  # long skips between tokens and latents: drop | error
    }
    | fields
  )
