// The model's thread, seen from the page: ask and await.

export class World {
  waiting = new Map();
  asked = 0;

  /** onStage(text): what takes so long. onTrouble(text): the thread itself is gone. */
  constructor(onStage, onTrouble) {
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => {
      if (data.stage) return onStage(data.stage);
      const { resolve, reject } = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (data.error) reject(new Error(data.error));
      else resolve(data.answer);
    };
    this.worker.onerror = (event) => onTrouble(event.message || "its files are missing");
  }

  ask(name, question = {}) {
    const id = ++this.asked;
    this.worker.postMessage({ id, name, question });
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
  }
}
