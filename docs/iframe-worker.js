// A page that is opened from a folder may start no worker, and the search runs in one: there a frame takes its place.
// As with a worker, what is sent is copied, and arrives when the sender has ended its turn.
if (location.protocol === "file:") {
  const send = (receiver, data) => {
    const message = new MessageEvent("message", { data: structuredClone(data) });
    setTimeout(() => receiver.dispatchEvent(message));
  };

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.addEventListener("message", message => this.onmessage?.(message));
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true });
      this.ready = new Promise(resolve => this.frame.addEventListener("load", resolve, { once: true }))
        .then(() => this.run(new URL(url, location).href));
      document.body.append(this.frame);
    }

    run(url) {
      const inner = this.frame.contentWindow;
      inner.postMessage = data => send(this, data);
      const script = Object.assign(inner.document.createElement("script"), { src: url });
      inner.document.body.append(script);
      return new Promise(resolve => (script.onload = () => resolve(inner)));
    }

    postMessage(data) {
      const sent = structuredClone(data);
      this.ready.then(inner => send(inner, sent));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
