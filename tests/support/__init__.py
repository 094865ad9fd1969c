"""What several tests use: models, splices, methods and inputs."""
