"""The methods that come with surgery, one file each, through the same door as third parties'."""
