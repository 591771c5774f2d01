"""Tables and folders of any hospital to the images, groups and labels of a manifest."""
