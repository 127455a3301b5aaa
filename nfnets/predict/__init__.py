"""A trained network as its user wants it: `load(file or workdir)` gives what turns photographs into classes. Above train/.

from nfnets import predict
classifier = predict.load("flowers.safetensors")  # or runs/flowers, or runs/flowers/checkpoints/800
classifier.top(["rose.jpg"], k=3)                 # [[("rose", 0.93), ("tulip", 0.05), ("daisy", 0.01)]]
classifier.network(classifier.prepare(["rose.jpg"]))  # logits, float32 [1, classes]
"""

from nfnets.predict.classifier import Classifier
from nfnets.predict.load import load

__all__ = ["Classifier", "load"]
