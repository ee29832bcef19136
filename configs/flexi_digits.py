"""The quickstart's network with a second patch size: two knobs, and weak steps first.

  make quickstart
  C="--config=configs/flexi_digits.py --workdir=runs/flexi"
  python main.py $C --mode=import --source=runs/digits --graft
  python main.py $C --mode=train
  python main.py $C --mode=sweep
Hardware: two CPU cores. What comes out: docs/flexidit.md.
"""

from ml_collections import ConfigDict

from configs import base, digits


def get_config() -> ConfigDict:
  """Patches of 4 x 4 besides 2 x 2, at three numbers of latents each."""
  config = digits.get_config()
  config.flexi = base.flexi(("p4",))
  config.budgets = ("p2+k8", "p2+k4", "p2+k1", "p4+k8", "p4+k2", "p4+k1")
  config.budget_weights = ()
  config.train.steps = 900
  config.train.preview_every = 0
  config.optim.lr = 5e-4
  config.eval.sweep_steps = (6, 12)
  config.eval.sweep_scales = ()
  config.eval.sweep_reuse = ()
  config.eval.sweep_seeds = 0
  config.eval.sweep_weak = (0.25, 0.5, 0.75)
  return config
