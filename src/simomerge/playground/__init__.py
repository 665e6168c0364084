"""The playground: a page in the browser where experts are merged, repaired and compared on one's own photos.

`opening` finds the models, `workshop` merges and predicts, `uploads` checks what a browser sends, `view` prepares what
the page shows, `page` is the page. Only `page` knows gradio.
"""
