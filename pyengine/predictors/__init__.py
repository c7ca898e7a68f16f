"""Predictors: which experts a later layer will need, told from the gate input of an earlier one.

They are data, one or two matrices for each layer, that the native engine multiplies gate inputs with; see Predictor.
What needs no gate input (pyengine.predictors.controls) is there to be beaten, and for the first layer, which none
precedes.
"""

from pyengine.predictors.archive import PredictorSet, load_predictors, predictors_file, save_predictors
from pyengine.predictors.predictor import Calibration, Predictor, PredictorError

#: Name of a form -> what it is. `auto` takes for each layer the one that recalls most of what is missing, or none.
FORMS: dict[str, str] = {
    "fate": "the target layer's router on the earlier gate input",
    "fate-corrected": "the same with the norms' gains set right",
    "linear": "a matrix learned from a trace",
    "mlp": "two matrices learned from a trace",
}

#: Name of a control -> what it is.
CONTROLS: dict[str, str] = {
    "fresh-gate": "the router on its own layer's gate input: what is to be predicted",
    "repeat-last": "the experts of the token before",
    "popularity": "the experts used most",
    "token-table": "the experts that the same token used before",
    "correlation": "experts that followed those of the layer before (Klotski)",
}

__all__ = [
    "CONTROLS",
    "FORMS",
    "Calibration",
    "Predictor",
    "PredictorError",
    "PredictorSet",
    "load_predictors",
    "predictors_file",
    "save_predictors",
]
