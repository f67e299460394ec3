"""A generated city, written as a nuScenes data root: tables, maps, lidar files and camera pictures.

``dataset`` writes all of it. Content: ``city`` (streets), ``scenery`` (buildings, trees, lamps), ``traffic`` (events of
a scene), ``rig`` (sensors). Output: ``tables``, ``lidar``, ``map_expansion``, ``render`` (pictures). Drawing:
``camera`` projects; ``ground``, ``sky`` and ``solids`` paint; ``light`` sets the colours. Pictures depend only on the
tables and maps (``footage``), so ``render`` also draws the missing pictures of a real nuScenes root.

Equal settings give equal bytes on every machine.
"""
