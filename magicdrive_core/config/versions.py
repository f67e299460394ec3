"""Version numbers of the computations whose results are kept on disk.

A fingerprint holds settings, digests of inputs and the versions of the computations behind a result. It does not hold
the text of source files: a corrected docstring regenerates nothing, a corrected formula regenerates what depends on it.

When the results of a computation change, raise its number by one. `tests/experiment/test_versions.py` compares a small
run of each computation with recorded numbers and says which one to raise. DVC reads this file as parameters
(dvc.yaml), so every number is a plain assignment.
"""

from __future__ import annotations

# Raise when the generated city looks different: its tables, maps, poses or rendered pictures.
CITY_VERSION = 1

# Raise when the scenes that are read from a data set change: frames, poses, boxes, descriptions, splits.
INFOS_VERSION = 1

# Raise when a BEV map is rasterised differently.
BEV_MAPS_VERSION = 1

# Raise when a scene's clips or what a clip is conditioned on change: captions, cameras, boxes, ego motion.
CONDITIONS_VERSION = 1

# Raise when the small VAE or the small T5 is built or measured differently.
ENCODERS_VERSION = 1

# Raise when T5 features of a text change for the same encoder.
TEXT_VERSION = 1

# Raise when the VAE encodes or decodes the same weights differently.
VAE_VERSION = 1

# Raise when pictures are cropped or resized differently, or latents are stored differently.
LATENTS_VERSION = 1

# Raise when the network's outputs or gradients change for the same weights and inputs.
NETWORK_VERSION = 1

# Raise when training changes: the initial weights, the order and augmentation of clips, the loss, the optimiser, EMA.
TRAINING_VERSION = 1

# Raise when sampling changes: noise, guidance, solver, step cache, windows, initial frames.
SAMPLER_VERSION = 1

# Raise when latents become other full-size frames, for example by another resize filter.
DECODE_VERSION = 1

# Raise when frames are written as other files, for example by another preset of the video encoder.
VIDEO_VERSION = 2

# Raise when the validator of a submission finds other faults.
VALIDATOR_VERSION = 1

# Raise when a score changes for the same package.
SCORES_VERSION = 1


def training_versions() -> dict[str, int]:
    """Return the versions that decide the weights of a training run.

    The encoders count, too: with ``latents.live``, ``text.live`` and ``conditions.maps: live`` they run in training.

    Returns:
        Version numbers by the name of the computation; part of the fingerprints of training stages.
    """
    return {
        "bev_maps": BEV_MAPS_VERSION,
        "conditions": CONDITIONS_VERSION,
        "text": TEXT_VERSION,
        "vae": VAE_VERSION,
        "latents": LATENTS_VERSION,
        "network": NETWORK_VERSION,
        "training": TRAINING_VERSION,
    }


def generation_versions() -> dict[str, int]:
    """Return the versions that decide the files of a generated item for the same weights.

    Returns:
        Version numbers by the name of the computation; part of the fingerprints of items.
    """
    return {
        "bev_maps": BEV_MAPS_VERSION,
        "conditions": CONDITIONS_VERSION,
        "text": TEXT_VERSION,
        "vae": VAE_VERSION,
        "latents": LATENTS_VERSION,
        "network": NETWORK_VERSION,
        "sampler": SAMPLER_VERSION,
        "decode": DECODE_VERSION,
        "video": VIDEO_VERSION,
    }
