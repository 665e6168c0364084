// Search from the disk. Browsers start no worker for a page without a server, so the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = this.onerror = null;
      this.waiting = [];
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true });
      this.frame.srcdoc = "<!doctype html><script>" +
        "self.importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((done, failed) =>" +
        " document.head.append(Object.assign(document.createElement('script'), { src: url, onload: done," +
        " onerror: failed })))));" +
        "self.postMessage = (data) => parent.dispatchEvent(new MessageEvent('frame-worker', { data }));" +
        `<\/script><script src="${new URL(url, location.href)}"><\/script>`;
      window.addEventListener("frame-worker", (event) => {
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      });
      this.frame.addEventListener("load", () => {
        this.loaded = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      });
      document.documentElement.append(this.frame);
    }
    postMessage(data) {
      if (!this.loaded) this.waiting.push(data);
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() { this.frame.remove(); }
  };
}
