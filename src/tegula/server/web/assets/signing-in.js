// The form that asks for a token, and the button that forgets it.

import { call, forgetToken, hasToken, keepToken, local } from "./api.js";

const at = (name) => document.getElementById(name);

// Show the form until a token is accepted; `reason` says why the last one was not.
function askForToken(reason) {
  at("token-form").hidden = false;
  at("token-error").textContent = reason;
  at("token").focus();
  return new Promise((resolve) => {
    at("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      keepToken(at("token").value);
      at("token").value = "";
      at("token-form").hidden = true;
      resolve();
    }, { once: true });
  });
}

// Return the account, once there is a valid token; servers without tokens have an account, too.
export async function signIn() {
  let reason = "";
  for (;;) {
    try {
      const account = await call("GET", "/v1/account");
      at("forget-token").hidden = !hasToken();
      return account;
    } catch (error) {
      if (error.status !== 401) throw error;
      reason = hasToken() ? "This server does not know that token." : reason;
      forgetToken();
      await askForToken(reason);
    }
  }
}

at("forget-token").addEventListener("click", () => {
  forgetToken();
  location.assign(local("/"));
});
