"""Generation: from items to folders of six videos.

``generate`` ties it together: ``items`` (what to generate) -> ``sampler`` and ``guided_sampling`` (latents) ->
``writer`` (files). ``claims`` and ``fan_out`` share items among workers, ``processes`` and ``worker`` share one item
among devices, ``models`` loads and places the models, and ``memory_plan`` plans their memory.
"""
