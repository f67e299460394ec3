"""From recordings to conditions: data set adapters, 12 Hz scenes, BEV maps, clips and scene edits.

Read ``records`` first: it holds ``Scene`` and ``ClipConditions``, which all other modules make or use.

* Reading: ``adapters`` (the interface), ``argoverse``, ``nuscenes_scenes`` with ``nuscenes_tables`` and
  ``nuscenes_files``; ``timeline`` lays frames between key frames and interpolates objects; ``vector_maps`` reads maps.
* Storing: ``infos`` (the stage), ``scene_store`` (one mapped file a scene), ``published_infos`` with ``plain_pickle``
  (import and export).
* Conditions: ``conditions`` (the stage, and the conditions of a clip), ``bev_maps`` (rasteriser), ``map_cache``,
  ``pictures``, ``clips``, ``buckets`` (micro-batches), ``edits`` (changes of scenes).
"""
