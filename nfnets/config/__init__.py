"""The typed configuration: plain dataclasses that a file of `configs/` fills in and the command line overrides.

`slots=True` turns a mistyped field into an error at construction and at assignment. Fields are checked when the object
is made and again, by `validate`, when it is read: an override on the command line assigns without constructing.
"""

from nfnets.config.data import DataConfig
from nfnets.config.init import InitConfig
from nfnets.config.model import ModelConfig
from nfnets.config.optim import OptimConfig
from nfnets.config.run import Config

__all__ = ["Config", "DataConfig", "InitConfig", "ModelConfig", "OptimConfig"]
