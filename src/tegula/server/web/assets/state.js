// A value that several parts of a page watch. Nobody changes it but by `set`.

export function createState(initial) {
  let value = initial;
  const watchers = new Set();
  return {
    get: () => value,
    // Lay a change over the value and tell everybody who watches.
    set(change) {
      value = { ...value, ...change };
      for (const watcher of [...watchers]) watcher(value);
    },
    // Call now and at every change; returns what ends it.
    watch(watcher) {
      watchers.add(watcher);
      watcher(value);
      return () => watchers.delete(watcher);
    },
  };
}

// What all tabs of this server tell each other: `tell("predictions")` when some were made or removed.
const channel = new BroadcastChannel("tegula");

export function tell(topic) {
  channel.postMessage(topic);
}

export function hear(topic, listener) {
  channel.addEventListener("message", (event) => event.data === topic && listener());
}
