"""Infer the control faster: as test5.py, but only the first generation starts from the input picture, in 32 steps.

Every later one starts from the previous result, noised again by warm_denoise_strength, and takes 10 steps.
Edit the settings and run `python test5_s1.py`, or give them as key=value. Leaves result.json and figure.png in out_dir.
"""

from ldm.settings import answer, run_script

if __name__ == "__main__":
    answer(__file__)

import test5

settings = dict(
    test5.settings,
    warm_steps=10,  # DDIM steps of every generation but the first
    warm_denoise_strength=0.9,  # share of the noise that the previous result is given
    out_dir="outputs/test5_s1",
)
main = test5.main


if __name__ == "__main__":
    run_script(main, settings)
