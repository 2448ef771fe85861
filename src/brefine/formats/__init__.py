"""What predictions are written as.

============  =======================================  =================================
``coco``      ``predictions.json``                     COCO results
``masks``     ``masks/PICTURE/CLASS_0001.png``         a black and white PNG an object
``idmap``     ``idmaps/PICTURE.png``, ``.csv``         one 16-bit PNG, and a table
``polygons``  ``polygons/PICTURE.json``                rings; holes are rings
``labelme``   ``labelme/PICTURE.json``                 polygons; holes tied in
``yolo``      ``yolo/labels/PICTURE.txt``, data.yaml   one polygon a line; all tied in
``cvat``      ``annotations.xml``                      CVAT for images 1.1, masks as RLE
``geojson``   ``geojson/PICTURE.geojson``              pixels, y down; holes are rings
``csv``       ``predictions.csv``                      a row an object, mask as RLE
``overlay``   ``overlays/PICTURE.png``                 drawn in
============  =======================================  =================================

All but the polygons keep every mask bit by bit, and they too with a tolerance of 0 pixels; what
else is lost is measured.
"""

FORMATS = (
    "coco",
    "masks",
    "idmap",
    "polygons",
    "labelme",
    "yolo",
    "cvat",
    "geojson",
    "csv",
    "overlay",
)
