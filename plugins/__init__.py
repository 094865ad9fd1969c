"""Hold the methods that come with surgery, one file each, registered as any plugin's are."""
