"""What every other room uses: errors, progress, files, schemas, processes, images. It imports nothing here."""
