"""Infer the control faster: as test5.py, but each generation starts from the previous one plus noise, in 10 steps.

Edit the settings and run `python test5_s1.py`, or give them as key=value. Leaves result.json and figure.png in out_dir.
"""

from ldm.settings import answer, run_script

if __name__ == "__main__":
    answer(__file__)

import test5
from test5 import main

settings = dict(
    test5.settings,
    warm_steps=10,  # DDIM steps of every iteration but the first
    warm_denoise_strength=0.9,  # how much of the previous result is noised away
    out_dir="outputs/test5_s1",
)

if __name__ == "__main__":
    run_script(main, settings)
