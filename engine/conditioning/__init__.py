"""What a person gives (prompts, layers, clips) turned into what a model takes."""
