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

// What the parts of this page and all other tabs of this server tell each other: `tell("predictions")`
// when some were created, have ended or were removed.
const channel = new BroadcastChannel("tegula");
const listeners = [];

export function tell(topic) {
  channel.postMessage(topic);
  for (const [name, listener] of listeners) if (name === topic) listener();
}

export function hear(topic, listener) {
  listeners.push([topic, listener]);
}

channel.addEventListener("message", ({ data }) => {
  for (const [name, listener] of listeners) if (name === data) listener();
});
