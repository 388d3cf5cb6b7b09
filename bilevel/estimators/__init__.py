"""scikit-learn estimators for tables, with a penalty for each feature tuned by hypergradients.

`pip install 'bilevel[sklearn]'` brings scikit-learn, which nothing else of the library imports.
"""

from bilevel.estimators.models import ElasticNetTuned, LogisticTuned, RidgeTuned, SquaredHingeTuned

__all__ = ["ElasticNetTuned", "LogisticTuned", "RidgeTuned", "SquaredHingeTuned"]
