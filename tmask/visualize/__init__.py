"""Pictures of what a model found: masks, boxes, skeletons and labels drawn into the image, and grids of such pictures.

Letters: K instances, H W image size, h w size of a picture. A picture is a PIL image, RGB.
"""

from tmask.visualize.draw import CROWD, FALSE, PARTS, check_parts, check_side, comparison, draw_instances, grid

__all__ = ["CROWD", "FALSE", "PARTS", "check_parts", "check_side", "comparison", "draw_instances", "grid"]
