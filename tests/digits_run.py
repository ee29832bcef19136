"""How the run of the fixture `digits_run` is trained, and how it is sampled."""

DIGITS_RUN = (
  "--config=configs/digits.py",
  "--config.train.steps=1",
  "--config.train.batch_size=16",
  "--config.train.preview_every=0",
  "--config.budgets=k1,k4",
  "--config.budget_weights=()",
  "--config.sample.steps=2",
  "--config.sample.count=3",
  "--config.sample.batch_size=8",
)
