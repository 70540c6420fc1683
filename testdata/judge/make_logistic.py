"""Makes logistic.json: logistic regressions of judges' credits on length differences, by statsmodels.

    pip install statsmodels==0.15.0
    python make_logistic.py > logistic.json

Run from this folder. Credits may be halves (ties), which a binomial GLM takes as shares.
"""

import json
import warnings

import numpy as np
import statsmodels
import statsmodels.api as sm

# statsmodels warns of credits that are no counts; shares are meant.
warnings.filterwarnings("ignore")

cases = []
for name, n, intercept, slope in [("longer wins", 300, -0.4, 0.02), ("length does not matter", 200, 0.8, 0.0)]:
    rng = np.random.default_rng(7)
    difference = rng.integers(-80, 120, size=n)
    p = 1 / (1 + np.exp(-(intercept + slope * difference)))
    credit = (rng.random(n) < p).astype(float)
    credit[rng.random(n) < 0.1] = 0.5
    scale = np.sqrt(np.mean(difference.astype(float) ** 2))
    fit = sm.GLM(credit, sm.add_constant(difference / scale), family=sm.families.Binomial()).fit(tol=1e-12)
    cases.append(
        {
            "name": name,
            "credits": credit.tolist(),
            "length_differences": difference.tolist(),
            "length_scale": float(scale),
            "intercept": float(fit.params[0]),
            "slope": float(fit.params[1]),
        }
    )
print(json.dumps({"statsmodels": statsmodels.__version__, "numpy": np.__version__, "cases": cases}))
