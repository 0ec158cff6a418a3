// A value that several parts of a page watch. Nobody changes it but by `set`.

export function createState(initial) {
  let value = initial;
  const watchers = [];
  return {
    get: () => value,
    // Merge a change into the value and call every watcher.
    set(change) {
      value = { ...value, ...change };
      for (const watcher of watchers) watcher(value);
    },
    // Call a watcher now and at every change.
    watch(watcher) {
      watchers.push(watcher);
      watcher(value);
    },
  };
}

// Topics between the parts of this page and all other tabs of this server: "predictions" when some
// were created, have ended or were removed, "signed-in" when somebody has signed in again.
const channel = new BroadcastChannel("tegula");
const subscribers = [];

function deliver(topic) {
  for (const [name, listener] of subscribers) if (name === topic) listener();
}

export function publish(topic) {
  channel.postMessage(topic);
  deliver(topic);
}

export function subscribe(topic, listener) {
  subscribers.push([topic, listener]);
}

channel.addEventListener("message", ({ data }) => deliver(data));
