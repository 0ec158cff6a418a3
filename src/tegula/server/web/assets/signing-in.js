// Who the browser is signed in as: the form that asks for a token, and the button to sign out.

import { call, local, signInWith, signOut, takeTokenFromAddress } from "./api.js";
import { byId, attempt, showError } from "./dom.js";
import { publish, subscribe } from "./state.js";

// Show the form until a token is accepted.
function askForToken() {
  byId("token-form").hidden = false;
  byId("token").focus();
  const over = new AbortController();
  return new Promise((resolve, reject) => {
    byId("token-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      const token = byId("token").value;
      byId("token").value = "";
      try {
        await signInWith(token);
      } catch (error) {
        if (error.status !== 401) {
          over.abort();
          reject(error);
          return;
        }
        byId("token-error").textContent =
          "This server does not know that token; tegula tokens create NAME makes a new one.";
        return;
      }
      byId("token-form").hidden = true;
      byId("token-error").textContent = "";
      over.abort();
      resolve();
    }, { signal: over.signal });
  });
}

// A token that ends while the page is open: what is on the page stays, and once somebody has signed in
// again, all tabs go on.
let asking = null;
document.addEventListener("sign-in", () => {
  asking ??= attempt(async () => {
    await askForToken();
    publish("signed-in");
  }).finally(() => (asking = null));
});
subscribe("signed-in", () => showError(""));

// Return the account, once there is one; servers without tokens have an account, too.
export async function signIn() {
  const given = takeTokenFromAddress();
  if (given) await signInWith(given).catch(() => {});
  let account = await call("GET", "/v1/account").catch((error) => {
    if (error.status !== 401) throw error;
    return null;
  });
  if (account === null) {
    await askForToken();
    account = await call("GET", "/v1/account");
  }
  byId("sign-out").hidden = account.username === "local";
  return account;
}

// The link of the demo, opened in a tab that shows the page already.
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) location.reload();
});

byId("sign-out").addEventListener("click", () => attempt(async () => {
  await signOut();
  location.assign(local("/"));
}));
