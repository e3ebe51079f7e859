"""Images for training and evaluation: the embedded digits, folders of images, and loaders that agree to the bit."""

from fewstep.data.digits import digits, write_image_folder
from fewstep.data.folder import ImageFolder, open_folder
from fewstep.data.loader import LOADERS, Loader, loader
from fewstep.data.order import Order

__all__ = ["LOADERS", "ImageFolder", "Loader", "Order", "digits", "loader", "open_folder", "write_image_folder"]
