"""Parameter groups, learning-rate schedule, optimizer and parameter averaging, all from one `OptimConfig`.

  ParameterGroup, default_groups   which parameters decay, which AGC clips, which are frozen; zero_frozen: their gradients
  parameter_groups                 assigns every parameter to one group; describe_groups prints them as a table
  peak_lr, make_schedule           compute the learning rate; layer_rates: its factors by layer
  are_alike                        says whether equal blocks are updated alike, so that they can be stacked
  make_optimizer                   chains AGC, weight decay, momentum (or Adam, or LARS) and the learning rate
  ema_update                       updates the parameters' exponential moving average (EMA)

A training step is

  updates, opt_state = optimizer.update(grads, opt_state, params)    # optimizer = make_optimizer(config, params, ...)
  params = optax.apply_updates(params, updates)
  ema = ema_update(ema, params, step, config.ema_decay)              # step = 0 at the first update

and equals the published one (Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without
Normalization", 2102.06171): AGC, then weight decay into the gradient, then Nesterov momentum, then the learning rate, then the
average.
"""

from nfnets.optim.blocks import are_alike
from nfnets.optim.depth import layer_rates
from nfnets.optim.ema import ema_update
from nfnets.optim.groups import ParameterGroup, default_groups, parameter_groups, zero_frozen
from nfnets.optim.optimizer import make_optimizer
from nfnets.optim.schedule import make_schedule, peak_lr
from nfnets.optim.table import describe_groups

__all__ = [
  "ParameterGroup",
  "are_alike",
  "default_groups",
  "describe_groups",
  "ema_update",
  "layer_rates",
  "make_optimizer",
  "make_schedule",
  "parameter_groups",
  "peak_lr",
  "zero_frozen",
]
